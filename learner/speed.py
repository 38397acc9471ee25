"""How much of the device the training uses: model FLOPs of a step over what it could do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from learner.batch import TrainBatch
from learner.starter_model import model_fields
from learner.starter_tokenizer import ALPHABET, SPECIAL
from ringasync.config.model_shape import (
    ModelShape,
    peak_tflops_of,
    read_shape,
    shape_of,
    train_flops,
)
from ringasync.config.schema import Config, LearnerConfig, StarterConfig


def shape_of_model(config: Config) -> ModelShape | None:
    """The shape of the run's model, which is on this machine by now; None where it is not known."""
    if config.model.path == "starter":
        return shape_of_starter(config.starter)
    path = Path(config.model.path)
    if path.is_dir():
        return read_shape(path)
    from transformers import AutoConfig

    try:
        return shape_of(AutoConfig.from_pretrained(config.model.path).to_dict())
    except (OSError, ValueError, KeyError, TypeError):
        return None  # the metric is absent; the run goes on


def shape_of_starter(starter: StarterConfig) -> ModelShape | None:
    """The shape of the model that the project builds."""
    fields = model_fields(starter, len(SPECIAL) + len(ALPHABET))
    return shape_of({"model_type": starter.architecture, **fields})


class SpeedGauge:
    """``train_tflop`` and ``mfu`` of a step; each absent where what it needs is not known."""

    def __init__(self, shape: ModelShape | None, learner: LearnerConfig, device_name: str) -> None:
        """``device_name`` may hold more than the name, as ``arithmetic`` of a step does."""
        self._shape = shape
        self._updates = learner.updates_per_batch
        self._peak_tflops = learner.ranks * (learner.peak_tflops or peak_tflops_of(device_name))

    def metrics(self, batch: TrainBatch, train_s: float) -> dict[str, Any]:
        """TFLOP of the step's training, whatever memory saving computes twice left out, and their
        share of all ranks' peak during ``train_s``."""
        if self._shape is None:
            return {}
        tflop = (
            train_flops(self._shape, sequence_lengths(batch), batch.trained_tokens, self._updates)
            / 1e12
        )
        if not self._peak_tflops or train_s <= 0:
            return {"train_tflop": tflop}
        return {"train_tflop": tflop, "mfu": tflop / train_s / self._peak_tflops}


def sequence_lengths(batch: TrainBatch) -> Sequence[int]:
    """Tokens of each sequence of the batch: the prompt and all after it."""
    return [
        int(item.trajectory.prompt_ids.size) + item.trajectory.num_tokens for item in batch.items
    ]
