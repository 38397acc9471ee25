"""Tokens a second over the last seconds."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from ringasync.clock import monotonic_s

WINDOW_S = 10.0


class Throughput:
    """Counts tokens; the rate is over ``WINDOW_S`` or since the first token, if that is less."""

    def __init__(self, clock: Callable[[], float] = monotonic_s) -> None:
        self._clock = clock
        self._recent: deque[tuple[float, int]] = deque()
        self._began_s: float | None = None
        self.tokens = 0

    def add(self, tokens: int) -> None:
        """Count tokens now."""
        now_s = self._clock()
        if self._began_s is None:
            self._began_s = now_s
        self.tokens += tokens
        self._recent.append((now_s, tokens))
        self._forget(now_s)

    def tokens_per_s(self) -> float:
        """The present rate; 0 before the first token."""
        if self._began_s is None:
            return 0.0
        now_s = self._clock()
        self._forget(now_s)
        span_s = min(WINDOW_S, now_s - self._began_s)
        return sum(tokens for _, tokens in self._recent) / span_s if span_s > 0 else 0.0

    def _forget(self, now_s: float) -> None:
        while self._recent and now_s - self._recent[0][0] > WINDOW_S:
            self._recent.popleft()
