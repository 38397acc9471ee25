"""Numbers out of samples: percentiles, spreads, shares. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, smallest and largest of a few repetitions: few repetitions have no percentiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{shown(self.median)} ({shown(self.low)} to {shown(self.high)})"


def spread(samples: Sequence[float]) -> Spread:
    """Raises ``ValueError`` when there is nothing to summarise."""
    if not samples:
        raise ValueError("no samples")
    return Spread(statistics.median(samples), min(samples), max(samples))


def percentile(samples: Sequence[float], percent: float) -> float:
    """The smallest sample that at least ``percent`` of all do not exceed: never interpolated.

    Raises ``ValueError`` when there are no samples.
    """
    if not samples:
        raise ValueError("no samples")
    return float(np.percentile(np.asarray(samples, np.float64), percent, method="inverted_cdf"))


def paired_ratios(tops: Sequence[float], bottoms: Sequence[float]) -> list[float]:
    """``tops[i] / bottoms[i]``: both measured in the same round, under the same load.

    Raises ``ValueError`` for unequal lengths or a zero below the line.
    """
    if 0 in bottoms:
        raise ValueError("a round measured zero: nothing to compare with")
    return [top / bottom for top, bottom in zip(tops, bottoms, strict=True)]


def shares(parts: Mapping[str, float], whole: float) -> dict[str, float]:
    """Each part as a share of ``whole``, and what no part accounts for as ``other``.

    ``other`` is negative when the parts overlap, which is worth seeing. Raises ``ValueError`` when
    ``whole`` is not positive.
    """
    if whole <= 0:
        raise ValueError("the whole must be positive")
    found = {name: seconds / whole for name, seconds in parts.items()}
    return found | {"other": 1.0 - sum(found.values())}


def shown(value: float) -> str:
    """A number as people read it: three figures, thousands by commas."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}"
