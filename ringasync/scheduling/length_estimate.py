"""Running mean of response lengths: what admission and the rounds estimate unfinished work with."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

DEFAULT_WINDOW = 512
DEFAULT_PRIOR_WEIGHT = 16


@dataclass(slots=True)
class LengthEstimate:
    """Mean length, in tokens, of the last ``window`` finished rollouts, with a prior.

    The prior counts as ``prior_weight`` rollouts and fades as lengths are seen. It should be high
    (the longest allowed length is safe): short rollouts finish first, so the first lengths seen
    are too short, and a low prior would admit too much before the long ones are known.
    A window rather than all of the past, because lengths drift as the policy learns.
    """

    prior_tokens: float
    window: int = DEFAULT_WINDOW
    prior_weight: int = DEFAULT_PRIOR_WEIGHT
    _recent: deque[int] = field(init=False, repr=False)
    _sum: int = field(init=False, default=0, repr=False)

    def __post_init__(self) -> None:
        if self.prior_tokens <= 0 or self.window < 1 or self.prior_weight < 0:
            raise ValueError("prior_tokens > 0, window >= 1 and prior_weight >= 0 are required")
        self._recent = deque()

    def observe(self, lengths_tokens: Iterable[int]) -> None:
        """Count finished rollouts. Raises ``ValueError`` on a negative length."""
        for length in lengths_tokens:
            if length < 0:
                raise ValueError(f"a rollout cannot have {length} tokens")
            self._recent.append(length)
            self._sum += length
            if len(self._recent) > self.window:
                self._sum -= self._recent.popleft()

    @property
    def count(self) -> int:
        """Lengths that the mean rests on at present."""
        return len(self._recent)

    @property
    def mean_tokens(self) -> float:
        """Expected length of a rollout; at least one token, so that room always runs out."""
        seen = len(self._recent)
        # The prior fades with the evidence and is gone once the window is full.
        weight = self.prior_weight * (1.0 - seen / self.window)
        total = seen + weight
        if total <= 0:
            return self.prior_tokens
        return max(1.0, (self._sum + weight * self.prior_tokens) / total)
