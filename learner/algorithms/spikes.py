"""Gradient norms that stand out against those of the steps before."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median

_LEAST = 5
"""Norms that must be known before one can stand out."""


@dataclass(frozen=True, slots=True)
class NormVerdict:
    """``median``: of the norms before this one, None while they are too few."""

    is_spike: bool
    median: float | None


class SpikeDetector:
    """A norm is a spike when it is above ``factor`` x the median of the last ``window`` norms.

    Spikes enter the window like any other norm: a median does not mind a few, and where the norms
    have risen for good it follows after half a window. ``factor`` 0: nothing is a spike.
    """

    def __init__(self, window: int, factor: float) -> None:
        self._norms: deque[float] = deque(maxlen=window)
        self._factor = factor

    def judge(self, norm: float) -> NormVerdict:
        """Compare ``norm`` with those before it, then remember it."""
        least = min(_LEAST, self._norms.maxlen or _LEAST)
        middle = median(self._norms) if len(self._norms) >= least else None
        self._norms.append(norm)
        if middle is None or self._factor == 0:
            return NormVerdict(False, middle)
        return NormVerdict(norm > self._factor * middle, middle)
