"""Mismatch metrics by token age, worked out by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from learner.algorithms.metrics import (
    TokenStats,
    age_label,
    concatenate,
    effective_sample_share,
    empty_stats,
    mismatch_report,
)


def stats(log_k: list[float], ages: list[int], weights: list[float] | None = None) -> TokenStats:
    count = len(log_k)
    return TokenStats(
        np.array(log_k),
        np.array(weights or [1.0] * count),
        np.array(ages, np.int64),
        np.zeros(count, np.bool_),
        np.full(count, math.nan),
    )


def test_by_age() -> None:
    report = mismatch_report(
        stats([0.0, 0.2, -1.0, 0.5, 2.0, 0.5], [0, 0, 2, 2, 2, 11], [1, 1, 0, 1, 0, 1]),
        mask_low=0.5,
        mask_high=5.0,
    )
    assert report["mask_rate"] == pytest.approx(2 / 6)
    assert report["mask_rate_by_age"] == {"0": 0.0, "2": pytest.approx(2 / 3), "8+": 0.0}
    assert report["staleness_tokens"] == {"0": 2, "2": 3, "8+": 1}
    assert report["drift_by_age"] == {
        "0": 0.0,
        "2": pytest.approx(0.5 - 0.1),
        "8+": pytest.approx(0.4),
    }
    assert report["by_age"]["2"]["below_rate"] == pytest.approx(1 / 3)
    assert report["by_age"]["2"]["above_rate"] == pytest.approx(1 / 3)
    assert report["gap_mean"] == pytest.approx(0.1)
    assert report["gap_max"] == pytest.approx(0.2)
    assert report["staleness_max"] == 11
    assert report["entropy"] is None
    json.dumps(report, allow_nan=False)


def test_gaps_that_are_not_finite_are_counted_not_averaged() -> None:
    report = mismatch_report(
        stats([math.inf, -math.inf, math.nan, 0.0], [0, 0, 0, 0], [0, 0, 0, 1]),
        mask_low=0.0,
        mask_high=5.0,
    )
    assert report["by_age"]["0"]["nonfinite_tokens"] == 3
    assert report["above_rate"] == 0.25
    assert report["below_rate"] == 0.0
    assert report["gap_max"] == 0.0
    json.dumps(report, allow_nan=False)


def test_no_token_of_age_zero_gives_no_drift() -> None:
    report = mismatch_report(stats([0.1], [3]), mask_low=0.5, mask_high=5.0)
    assert report["drift_by_age"] == {}
    assert report["gap_mean"] is None


def test_effective_sample_share() -> None:
    assert effective_sample_share(np.array([2.0, 2.0])) == 1.0
    assert effective_sample_share(np.array([1.0, 0.0])) == 0.5
    assert effective_sample_share(np.zeros(3)) == 0.0


def test_nothing_trained() -> None:
    assert empty_stats().num_tokens == 0
    assert mismatch_report(empty_stats(), mask_low=0.5, mask_high=5.0) == {}
    assert concatenate([stats([0.1], [0]), stats([0.2], [1])]).ages.tolist() == [0, 1]
    assert [age_label(age) for age in (0, 7, 8, 30)] == ["0", "7", "8+", "8+"]
