"""Verifiers that hang: those that are waited for too long, and those that were killed for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ringasync.clock import monotonic_s
from ringasync.errors import VerifierTimeoutError
from ringasync.observability.stalls import Awaited, StallClock, together

_SHOWN_S = 60.0
"""A verifier that was killed at its time limit is named for this long."""
_REMEDY = (
    "mend the verifier or raise grader.timeout_s; after grader.max_attempts tries the group ends "
    "as grade_error"
)


class VerdictWatch:
    """Told of each verdict that is asked for; ``stall`` names the oldest that is overdue."""

    def __init__(self, deadline_s: float, clock: Callable[[], float] = monotonic_s) -> None:
        self._clock = clock
        self._stalls = StallClock(deadline_s, clock)
        self._asked: dict[str, str] = {}
        self._killed: tuple[float, str] = (float("-inf"), "")
        self._kills = 0

    @contextmanager
    def asking(self, rollout_id: str, task: dict[str, Any]) -> Iterator[None]:
        """As long as a verdict on this rollout is awaited."""
        verifier = str(task.get("verifier", "?"))
        self._asked[rollout_id] = verifier
        try:
            yield
        except VerifierTimeoutError as error:
            self._kills += 1
            self._killed = (self._clock(), f"{verifier!r} on {rollout_id}: {error}")
            raise
        finally:
            self._asked.pop(rollout_id, None)

    def stall(self) -> str:
        """What is overdue, in words."""
        awaited = {}
        if self._asked:
            rollout_id, verifier = next(iter(self._asked.items()))
            owed_by = f"verifier {verifier!r}"
            what = f"a verdict on {rollout_id}"
            awaited["verdict"] = Awaited(what, owed_by, _REMEDY, rollout_id)
        found = [self._stalls.look(awaited)]
        ago_s = self._clock() - self._killed[0]
        if ago_s < _SHOWN_S:
            said = f"verifier {self._killed[1]}, killed {ago_s:.0f} s ago ({self._kills} by now)"
            found.append(f"{said}; {_REMEDY}")
        return together(found)
