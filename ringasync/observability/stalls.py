"""Waits with a deadline: what is awaited, who owes it, since when, what to do."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass

from ringasync.clock import monotonic_s
from ringasync.observability.log import get_logger

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Awaited:
    """Something that somebody owes, for people; ``remedy`` says what to do when it does not come.

    ``sign`` changes with every progress; the wait then begins anew.
    """

    what: str
    owed_by: str
    remedy: str
    sign: Hashable = ""


def in_words(awaited: Awaited, waited_s: float) -> str:
    """One line for ``top`` and the health endpoint."""
    return f"{waited_s:.0f} s: {awaited.what}; owed by {awaited.owed_by}; {awaited.remedy}"


def together(stalls: Iterable[str]) -> str:
    """Several of them in one line; empty ones left out."""
    return "; also ".join(each for each in stalls if each)


class StallClock:
    """Since when each thing is awaited. What is overdue is named in the log, at first at
    ``deadline_s`` and then this often, and in ``look``'s answer for as long as it lasts."""

    def __init__(self, deadline_s: float, clock: Callable[[], float] = monotonic_s) -> None:
        self._deadline_s, self._clock = deadline_s, clock
        self._since: dict[str, tuple[Hashable, float]] = {}
        self._said: dict[str, float] = {}

    def look(self, awaited: Mapping[str, Awaited]) -> str:
        """Take note of all that is awaited now, by name; the overdue ones in words, or nothing."""
        now_s = self._clock()
        for name in self._since.keys() - awaited.keys():
            del self._since[name]
            self._end(name)
        overdue = []
        for name, one in awaited.items():
            sign, since_s = self._since.get(name, (None, now_s))
            if name not in self._since or sign != one.sign:
                since_s = now_s
                self._since[name] = (one.sign, now_s)
                self._end(name)
            if now_s - since_s >= self._deadline_s:
                overdue.append(in_words(one, now_s - since_s))
                self._say(name, one, since_s, now_s)
        return together(overdue)

    def _say(self, name: str, one: Awaited, since_s: float, now_s: float) -> None:
        if now_s - self._said.get(name, -self._deadline_s) < self._deadline_s:
            return
        self._said[name] = now_s
        waited_s = round(now_s - since_s, 1)
        log.warning(
            "waiting too long",
            awaited=one.what,
            owed_by=one.owed_by,
            since_s=waited_s,
            remedy=one.remedy,
        )

    def _end(self, name: str) -> None:
        if self._said.pop(name, None) is not None:
            log.info("no longer waiting", awaited=name)
