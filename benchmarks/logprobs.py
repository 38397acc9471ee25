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

import numpy as np
import torch

from learner.backends.torch_backend import TorchBackend, TorchSettings
from learner.batch import BatchItem, TrainBatch
from ringasync.config.schema import LearnerConfig, LossConfig
from ringasync.records.trajectory import Trajectory

ROW_TOKENS = 1024
PROMPT_TOKENS = 64
STEPS = 3


def batch_of(tokens: int, vocab: int) -> TrainBatch:
    """``tokens`` trained tokens in rows of ``ROW_TOKENS``, drawn at random."""
    generator = np.random.default_rng(0)
    items = []
    for row in range(max(1, tokens // ROW_TOKENS)):
        count = min(ROW_TOKENS, tokens)
        one = Trajectory(
            rollout_id=f"g{row}.0",
            group_id=f"g{row}",
            domain="bench",
            prompt_ids=generator.integers(0, vocab, PROMPT_TOKENS).astype(np.int32),
            token_ids=generator.integers(0, vocab, count).astype(np.int32),
            behavior_logprobs=np.full(count, -np.log(vocab), np.float32),
            policy_versions=np.ones(count, np.int32),
            loss_mask=np.ones(count, np.bool_),
            reward=1.0,
            finish_reason="stop",
        )
        items.append(BatchItem(one, (-1.0) ** row, count))
    trained = sum(item.trained_tokens for item in items)
    return TrainBatch("b", 0, trained, tuple(items), {1: 0})


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
            head_dim=arguments.hidden // 4,
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
