"""Group advantages against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.algorithms.advantages import group_advantages, is_flat

rewards = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12)


def test_sample_deviation_by_hand() -> None:
    # mean 0.5, squares sum to 1, ddof 1: std = sqrt(1/3)
    expected = [0.5 * math.sqrt(3), -0.5 * math.sqrt(3), 0.5 * math.sqrt(3), -0.5 * math.sqrt(3)]
    np.testing.assert_allclose(group_advantages([1, 0, 1, 0]), expected, rtol=1e-15)
    # mean 1, deviations -1 0 1, std 1
    np.testing.assert_allclose(group_advantages([0, 1, 2]), [-1, 0, 1], rtol=1e-15)


def test_without_division() -> None:
    values = group_advantages([1, 0, 0, 0], divide_by_std=False)
    np.testing.assert_array_equal(values, [0.75, -0.25, -0.25, -0.25])


@pytest.mark.parametrize("group", [[0.9] * 16, [0.1] * 7, [1.0], [-0.3], [0.0, -0.0]])
def test_flat_groups_are_exactly_zero(group: list[float]) -> None:
    assert is_flat(group)
    assert not group_advantages(group).any()
    assert not group_advantages(group, divide_by_std=False).any()


def test_nearly_flat_group_is_not_flat() -> None:
    group = [0.9, math.nextafter(0.9, 1), 0.9]
    assert not is_flat(group)
    assert np.isfinite(group_advantages(group)).all()


def test_tiny_deviations_do_not_underflow() -> None:
    np.testing.assert_allclose(group_advantages([0.0, 1e-200, 2e-200]), [-1, 0, 1], rtol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_refuses_rewards_that_are_no_numbers(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        group_advantages([0.0, bad])


@given(rewards)
def test_mean_is_zero_and_deviation_one(group: list[float]) -> None:
    values = group_advantages(group)
    assert values.shape == (len(group),)
    if is_flat(group):
        assert not values.any()
    elif values.any():
        assert abs(values.sum()) < 1e-3
        assert values.std(ddof=1) == pytest.approx(1.0, abs=1e-3)


@given(rewards, st.randoms(use_true_random=False))
def test_order_does_not_matter(group: list[float], random: object) -> None:
    places = list(range(len(group)))
    random.shuffle(places)  # type: ignore[attr-defined]
    direct = group_advantages(group)[places]
    np.testing.assert_allclose(
        group_advantages([group[place] for place in places]), direct, rtol=1e-6, atol=1e-6
    )
