"""The learning rate by hand, and resumed in the middle of its fall."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from learner.algorithms.schedule import LrSchedule, learning_rate
from learner.algorithms.spikes import SpikeDetector
from ringasync.config.schema import LearnerConfig

from .kit import tiny_backend, toy_batch


def rates(schedule: LrSchedule, updates: int, **changes: Any) -> list[float]:
    settings: dict[str, Any] = {"warmup_updates": 2, "total_updates": 5, **changes}
    return [
        learning_rate(8.0, updates_done=done, schedule=schedule, **settings)
        for done in range(updates)
    ]


def test_warm_up_then_constant() -> None:
    assert rates("constant", 5, warmup_updates=4) == [2.0, 4.0, 6.0, 8.0, 8.0]
    assert rates("constant", 2, warmup_updates=0) == [8.0, 8.0]


def test_linear_falls_from_the_peak_to_the_least_share() -> None:
    assert rates("linear", 7) == [4.0, 8.0, 6.0, 4.0, 2.0, 0.0, 0.0]
    assert rates("linear", 6, min_ratio=0.5) == [4.0, 8.0, 7.0, 6.0, 5.0, 4.0]


def test_cosine() -> None:
    expected = [4.0, 8.0, *(4 * (1 + math.cos(math.pi * part / 4)) for part in (1, 2, 3)), 0.0]
    assert rates("cosine", 6) == pytest.approx(expected)


def test_a_warm_up_longer_than_the_run_never_falls() -> None:
    assert rates("cosine", 3, warmup_updates=8, total_updates=3) == [1.0, 2.0, 3.0]


def test_resume_in_the_middle_of_the_fall_is_exact(tmp_path: Path) -> None:
    learner = LearnerConfig(
        steps=3, lr=1e-3, warmup_steps=1, lr_schedule="cosine", updates_per_batch=2
    )
    straight, resumed = tiny_backend(learner), tiny_backend(learner)
    made = [straight.train_batch(toy_batch(step=step)).lr for step in range(2)]
    straight.begin_save(tmp_path / "saved").result()
    made.append(straight.train_batch(toy_batch(step=2)).lr)
    resumed.load(tmp_path / "saved")
    assert resumed.train_batch(toy_batch(step=2)).lr == made[2]
    assert made == sorted(made, reverse=True)
    assert made[2] < made[0]
    mine, theirs = straight.state_dict(), resumed.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def test_a_norm_far_above_the_median_is_a_spike() -> None:
    detector = SpikeDetector(window=5, factor=3.0)
    assert not any(detector.judge(norm).is_spike for norm in (100.0, 1.0, 1.0, 2.0, 1.0))
    verdict = detector.judge(3.0)
    assert (verdict.is_spike, verdict.median) == (False, 1.0)  # as large as the bound is no spike
    assert detector.judge(3.5).is_spike
    # Window now: 1, 2, 1, 3, 3.5. One spike in it hardly moves the median.
    assert detector.judge(5.9).median == 2.0


def test_norms_that_rose_for_good_are_no_spikes_after_half_a_window() -> None:
    detector = SpikeDetector(window=5, factor=3.0)
    verdicts = [detector.judge(norm).is_spike for norm in [1.0] * 5 + [10.0] * 4]
    assert verdicts == [False] * 5 + [True] * 3 + [False]


def test_too_few_norms_and_factor_0_say_nothing() -> None:
    few, off = SpikeDetector(window=8, factor=2.0), SpikeDetector(window=8, factor=0.0)
    assert [few.judge(norm).is_spike for norm in (1.0, 1.0, 1.0, 1.0, 99.0)] == [False] * 5
    assert few.judge(99.0).is_spike
    assert not any(off.judge(norm).is_spike for norm in [1.0] * 6 + [99.0])
