"""The learning rate as a function of the updates done, and of nothing else."""

from __future__ import annotations

import math
from typing import Literal

LrSchedule = Literal["constant", "linear", "cosine"]


def learning_rate(
    peak: float,
    *,
    warmup_updates: int,
    updates_done: int,
    schedule: LrSchedule = "constant",
    total_updates: int = 0,
    min_ratio: float = 0.0,
) -> float:
    """Learning rate of the next update.

    Linear warm-up: update number ``warmup_updates`` (1 is the first) is the first at ``peak``. From
    there ``constant`` stays; ``linear`` and ``cosine`` fall to ``min_ratio * peak``, which they
    would reach one update after the last of ``total_updates``, so that no update is wasted on a
    rate of 0; updates beyond that number stay there. 0 stays 0.
    """
    if updates_done + 1 < warmup_updates:
        return peak * ((updates_done + 1) / warmup_updates)
    if schedule == "constant":
        return peak
    at_peak = max(0, warmup_updates - 1)
    progress = min(1.0, (updates_done - at_peak) / max(1, total_updates - at_peak))
    share = 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (min_ratio + (1.0 - min_ratio) * share)
