"""How long training stands still for checkpoints: written beside it, and waited for.

``python -m benchmarks.checkpoint [--device cuda|cpu] [--hidden N] [--layers N] [--vocab N]
[--steps N] [--every N] [--dir DIR]`` trains the same batches each way in a process of its own, with
the learner's backend and checkpoint files, and prints one JSON line each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.logprobs import ROW_TOKENS, batch_of
from learner.backends.torch_backend import TorchBackend, TorchSettings
from learner.checkpoint import CheckpointMeta, PendingCheckpoint
from ringasync.config.schema import LearnerConfig, LossConfig

KEEP = 2
HEAD_DIM = 64


def make_backend(arguments: argparse.Namespace) -> TorchBackend:
    """A Qwen3 of the wanted size with random weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    heads = max(1, arguments.hidden // HEAD_DIM)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=arguments.vocab,
            hidden_size=arguments.hidden,
            intermediate_size=3 * arguments.hidden,
            num_hidden_layers=arguments.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=HEAD_DIM,
            max_position_embeddings=2 * ROW_TOKENS,
        )
    )
    dtype = torch.bfloat16 if arguments.device.startswith("cuda") else torch.float32
    learner = LearnerConfig(device=arguments.device, threads=torch.get_num_threads())
    return TorchBackend(model, TorchSettings(learner, LossConfig(), dtype=dtype))


def write(pending: PendingCheckpoint) -> float:
    """Finish a checkpoint; returns the seconds since its staging."""
    began = time.perf_counter()
    try:
        pending.seal()
        pending.publish(keep=KEEP)
    finally:
        pending.discard()
    return time.perf_counter() - began


def measure(
    arguments: argparse.Namespace, directory: Path, asynchronous: bool
) -> dict[str, object]:
    """Seconds that the training thread stood still a checkpoint, and what the steps took.

    ``waits_s`` is the part of ``stalls_s`` in which the checkpoint before was still being written:
    where it is not 0, checkpoints follow faster than this disk takes them.
    """
    backend = make_backend(arguments)
    batch = batch_of(arguments.tokens, arguments.vocab)
    backend.train_batch(batch)  # makes the optimizer's state, and warms up
    stalls, waits, steps, writes = [], [], [], []
    under_way: Future[float] | None = None
    began_run = time.perf_counter()
    with ThreadPoolExecutor(max_workers=1) as beside:
        for step in range(1, arguments.steps + 1):
            began = time.perf_counter()
            backend.train_batch(batch)
            steps.append(time.perf_counter() - began)
            if step % arguments.every:
                continue
            began = time.perf_counter()
            if under_way is not None:
                writes.append(under_way.result())
            waits.append(time.perf_counter() - began)
            meta = CheckpointMeta("bench", step, 1, 1, 0, step, 0, "{}")
            pending = PendingCheckpoint.begin(directory, meta, (), backend.begin_save)
            under_way = beside.submit(write, pending)
            if not asynchronous:
                under_way.exception()  # wait
            stalls.append(time.perf_counter() - began)
        if under_way is not None:
            writes.append(under_way.result())
    state = backend.state_dict()
    return {
        "checkpoint_async": asynchronous,
        "device": arguments.device,
        "parameters": sum(p.numel() for p in backend.model.parameters()),
        "state_bytes": sum(tensor.nbytes for tensor in state.values()),
        "stall_first_s": stalls[0] if stalls else None,
        "stalls_s": stalls,
        "waits_s": waits,
        "writes_s": writes,
        "steps_s": steps,
        "run_s": time.perf_counter() - began_run,
    }


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``make_backend`` reads, a step's size, where files go, and which way alone."""
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=2048, help="trained tokens a step")
    parser.add_argument("--dir", type=Path, help="where files are written, and removed")
    parser.add_argument("--only", choices=("async", "sync"))


def main() -> int:
    """Measure both ways, or one where ``--only`` names it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_model_arguments(parser)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--every", type=int, default=3, help="steps between checkpoints")
    arguments = parser.parse_args()
    if arguments.only is not None:
        with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
            result = measure(arguments, Path(folder), arguments.only == "async")
        print(json.dumps(result), flush=True)
        return 0
    for way in ("sync", "async"):
        command = [sys.executable, "-m", "benchmarks.checkpoint", *sys.argv[1:], "--only", way]
        subprocess.run(command, check=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
