"""Memory and time of a training step with all logits at once and in chunks of positions.

``python -m benchmarks.logprobs [--device cuda] [--vocab N] [--tokens N] [--chunk N]`` runs each way
in a process of its own, since a peak of memory is never taken back, and prints one JSON line each.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from benchmarks.random_batch import PROMPT_TOKENS, random_batch
from learner.backends.torch_backend import TorchBackend, TorchSettings
from learner.batch import TrainBatch
from ringasync.config.schema import LearnerConfig, LossConfig

ROW_TOKENS = 1024
STEPS = 3


def batch_of(tokens: int, vocab: int) -> TrainBatch:
    """``tokens`` trained tokens in rows of ``ROW_TOKENS``, drawn at random."""
    rows = max(1, tokens // ROW_TOKENS)
    return random_batch([min(ROW_TOKENS, tokens)] * rows, vocab)


def measure(arguments: argparse.Namespace, chunk_tokens: int) -> dict[str, object]:
    """Peak memory in bytes and the median time of a step in seconds."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=arguments.vocab,
            hidden_size=arguments.hidden,
            intermediate_size=2 * arguments.hidden,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=min(128, arguments.hidden // 4),
            max_position_embeddings=ROW_TOKENS + PROMPT_TOKENS,
        )
    )
    learner = LearnerConfig(
        device=arguments.device, microbatch_tokens=10**9, logprob_chunk_tokens=chunk_tokens
    )
    dtype = torch.bfloat16 if arguments.device.startswith("cuda") else torch.float32
    backend = TorchBackend(model, TorchSettings(learner, LossConfig(), dtype=dtype))
    batch = batch_of(arguments.tokens, arguments.vocab)
    times = []
    for _ in range(STEPS):
        began = time.perf_counter()
        loss = backend.train_batch(batch).loss
        times.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if arguments.device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated()
    return {
        "chunk_tokens": chunk_tokens,
        "trained_tokens": batch.trained_tokens,
        "vocab": arguments.vocab,
        "peak_bytes": peak,
        "step_s": sorted(times)[len(times) // 2],
        "last_loss": loss,
    }


def main() -> int:
    """Measure both ways, or one where ``--only`` names its chunk."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--chunk", type=int, default=LearnerConfig().logprob_chunk_tokens)
    parser.add_argument("--only", type=int)
    arguments = parser.parse_args()
    if arguments.only is not None:
        print(json.dumps(measure(arguments, arguments.only)), flush=True)
        return 0
    for chunk_tokens in (0, arguments.chunk):
        command = [sys.executable, "-m", "benchmarks.logprobs", *sys.argv[1:]]
        subprocess.run([*command, "--only", str(chunk_tokens)], check=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
