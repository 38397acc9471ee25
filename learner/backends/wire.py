"""Batches between ranks as msgpack: fields by position, arrays as dtype, shape and bytes."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import msgpack
import numpy as np

from learner.backends.base import ScoredSequence
from learner.batch import BatchItem, TrainBatch
from ringasync.records.trajectory import Trajectory

_ARRAY = "array"
_TRAJECTORY = tuple(field.name for field in fields(Trajectory))


def pack_batch(batch: TrainBatch) -> bytes:
    """Everything of ``batch``, bit for bit."""
    items = [
        [
            [_pack(getattr(item.trajectory, name)) for name in _TRAJECTORY],
            float(item.advantage),
            item.trained_tokens,
        ]
        for item in batch.items
    ]
    ages = [[version, age] for version, age in batch.ages.items()]
    return bytes(
        msgpack.packb([batch.batch_id, batch.learner_step, batch.budget_tokens, items, ages])
    )


def unpack_batch(payload: bytes) -> TrainBatch:
    """What ``pack_batch`` packed."""
    batch_id, learner_step, budget_tokens, items, ages = msgpack.unpackb(payload)
    return TrainBatch(
        batch_id,
        learner_step,
        budget_tokens,
        tuple(
            BatchItem(Trajectory(*map(_unpack, trajectory)), advantage, trained_tokens)
            for trajectory, advantage, trained_tokens in items
        ),
        dict(ages),
    )


def pack_sequences(sequences: list[ScoredSequence]) -> list[Any]:
    """Plain data for msgpack."""
    return [[list(one.prompt_ids), list(one.token_ids)] for one in sequences]


def unpack_sequences(plain: list[Any]) -> list[ScoredSequence]:
    """What ``pack_sequences`` gave."""
    return [ScoredSequence(tuple(prompt), tuple(tokens)) for prompt, tokens in plain]


def _pack(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {_ARRAY: [value.dtype.str, list(value.shape), value.tobytes()]}
    return value


def _unpack(value: Any) -> Any:
    if isinstance(value, dict):
        kind, shape, raw = value[_ARRAY]
        # A copy: torch shares memory with arrays, and these bytes cannot be written to.
        return np.frombuffer(raw, dtype=np.dtype(kind)).reshape(shape).copy()
    return value
