"""Mean reward with a 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Z_95 = 1.959963984540054


@dataclass(frozen=True, slots=True)
class MeanInterval:
    """A mean over ``n`` values and its 95 % interval; of one value that is not 0 or 1, itself."""

    mean: float
    low: float
    high: float
    n: int
    method: Literal["wilson", "normal"]


def mean_interval(values: Sequence[float]) -> MeanInterval | None:
    """Wilson's interval when all values are 0 or 1, else the normal one; None without values.

    Wilson's stays inside [0, 1] and is sound near its ends, where the normal interval of a
    proportion shrinks to nothing. Source: Wilson (1927), JASA 22, p. 209.
    """
    n = len(values)
    if n == 0:
        return None
    mean = sum(values) / n
    if all(value in (0.0, 1.0) for value in values):
        spread = Z_95 * Z_95
        centre = (mean + spread / (2 * n)) / (1 + spread / n)
        half = Z_95 / (1 + spread / n) * math.sqrt(mean * (1 - mean) / n + spread / (4 * n * n))
        return MeanInterval(mean, max(0.0, centre - half), min(1.0, centre + half), n, "wilson")
    if n < 2:
        return MeanInterval(mean, mean, mean, n, "normal")
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)
    half = Z_95 * math.sqrt(variance / n)
    return MeanInterval(mean, mean - half, mean + half, n, "normal")
