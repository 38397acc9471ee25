"""Percentiles, spreads and shares, against values worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.stats import Spread, paired_ratios, percentile, shares, shown, spread

_FLOATS = st.floats(-1e6, 1e6)


def test_percentile_is_a_sample() -> None:
    hundred = [float(n) for n in range(100, 0, -1)]
    assert percentile(hundred, 50) == 50
    assert percentile(hundred, 99) == 99
    assert percentile(hundred, 100) == 100
    assert percentile([7.0], 99) == 7
    assert percentile([1.0, 2.0], 50) == 1
    assert percentile([1.0, 2.0], 51) == 2


@given(st.lists(_FLOATS, min_size=1), st.floats(0.1, 100))
def test_percentile_covers_its_share_and_no_smaller_sample_does(
    samples: list[float], percent: float
) -> None:
    found = percentile(samples, percent)
    assert found in samples
    covered = sum(sample <= found for sample in samples) / len(samples)
    below = sum(sample < found for sample in samples) / len(samples)
    assert covered * 100 >= percent - 1e-9
    assert below * 100 < percent + 1e-9


def test_spread() -> None:
    assert spread([3.0, 1.0, 10.0]) == Spread(3.0, 1.0, 10.0)
    assert spread([2.0]) == Spread(2.0, 2.0, 2.0)
    assert str(Spread(1234.5, 0.1234, 12.34)) == "1,234 (0.123 to 12.3)"


@pytest.mark.parametrize("summary", [spread, lambda samples: percentile(samples, 50)])
def test_nothing_cannot_be_summarised(summary: object) -> None:
    assert callable(summary)
    with pytest.raises(ValueError, match="no samples"):
        summary([])


def test_ratios_are_within_a_round() -> None:
    assert paired_ratios([2.0, 9.0], [4.0, 3.0]) == [0.5, 3.0]
    with pytest.raises(ValueError, match="measured zero"):
        paired_ratios([1.0], [0.0])
    with pytest.raises(ValueError, match="zip"):
        paired_ratios([1.0], [1.0, 2.0])


def test_shares_add_up_to_one() -> None:
    found = shares({"wait": 2.0, "train": 5.0}, 10.0)
    assert found == {"wait": 0.2, "train": 0.5, "other": pytest.approx(0.3)}
    assert shares({"wait": 12.0}, 10.0)["other"] == pytest.approx(-0.2)
    with pytest.raises(ValueError, match="positive"):
        shares({"wait": 1.0}, 0.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.01234, "0.012"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (-12.34, "-12.3"),
        (123.4, "123"),
        (123456.7, "123,457"),
    ],
)
def test_shown(value: float, text: str) -> None:
    assert shown(value) == text
