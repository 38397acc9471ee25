"""``train_tflop`` and ``mfu`` of a step, from a real batch and the starter's real size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from learner.speed import SpeedGauge, sequence_lengths, shape_of_starter
from learner.starter_model import build_model
from learner.starter_tokenizer import ALPHABET, SPECIAL
from ringasync.config.model_shape import ModelShape, train_flops
from ringasync.config.schema import LearnerConfig, StarterConfig
from tests.learner.kit import toy_batch

SHAPE = ModelShape(
    vocab=10, hidden=4, layers=1, heads=2, kv_heads=1, head_dim=2, intermediate=8, tied=True
)


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe"])
def test_the_starters_shape_is_that_of_the_model_it_builds(architecture: Any) -> None:
    settings = StarterConfig(architecture=architecture)
    model = build_model(settings, len(SPECIAL) + len(ALPHABET), 64)
    count = sum(each.numel() for each in model.parameters())
    shape = shape_of_starter(settings)
    assert shape is not None
    assert shape.parameters == count


def test_mfu_is_work_over_time_and_peak() -> None:
    batch = toy_batch()
    lengths = sequence_lengths(batch)
    assert lengths == [5 + 5 + 3 * index for index in range(6)]  # prompts have 5 tokens
    tflop = train_flops(SHAPE, lengths, int(np.sum(lengths)) - 6 * 5) / 1e12
    found = SpeedGauge(SHAPE, LearnerConfig(peak_tflops=3.0), "cpu").metrics(batch, 2.0)
    assert found == {"train_tflop": tflop, "mfu": pytest.approx(tflop / 2.0 / 3.0)}


def test_the_peak_of_a_known_gpu_needs_no_setting() -> None:
    named = SpeedGauge(SHAPE, LearnerConfig(), "cuda NVIDIA H100 80GB HBM3, torch 2.9")
    given = SpeedGauge(SHAPE, LearnerConfig(peak_tflops=989.0), "cpu")
    assert named.metrics(toy_batch(), 1.0) == given.metrics(toy_batch(), 1.0)


def test_what_is_not_known_is_absent() -> None:
    no_shape = SpeedGauge(None, LearnerConfig(peak_tflops=1.0), "cpu")
    no_peak = SpeedGauge(SHAPE, LearnerConfig(), "cpu AVX2")
    assert no_shape.metrics(toy_batch(), 1.0) == {}
    assert set(no_peak.metrics(toy_batch(), 1.0)) == {"train_tflop"}
