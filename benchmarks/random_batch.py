"""A batch of random tokens, for benchmarks of the learner's step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from learner.batch import BatchItem, TrainBatch
from ringasync.records.trajectory import Trajectory

PROMPT_TOKENS = 64


def random_batch(counts: Sequence[int], vocab: int) -> TrainBatch:
    """A rollout of each of these numbers of tokens behind a prompt; all of them train."""
    generator = np.random.default_rng(0)
    items = []
    for row, count in enumerate(counts):
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
