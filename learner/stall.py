"""Stall reports: while the learner waits, say what for, who owes it and since when."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import structlog

from ringasync.broker.client import Broker
from ringasync.observability.stalls import Awaited, in_words

_REMEDY = "`ringasync top` shows what they do; start workers if there are none"


class StallWatch:
    """Logs at most one report every ``report_s`` while something is awaited.

    ``say`` is told it in words for ``top`` and the health endpoint, and nothing once it came.
    """

    def __init__(
        self, broker: Broker, report_s: float, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self._broker, self._say = broker, say
        self._report_s = report_s
        self._since = time.monotonic()
        self._reported = self._since
        self._log = structlog.get_logger(__name__)
        self.reports = 0

    def progress(self) -> None:
        """What was awaited came: the clock starts again."""
        self._since = self._reported = time.monotonic()
        self._say("")

    @property
    def waited_s(self) -> float:
        """Seconds since the last progress."""
        return time.monotonic() - self._since

    async def waiting(self, awaited: str, **details: Any) -> None:
        """Call on every turn of a wait; reports when it is time."""
        if time.monotonic() - self._reported < self._report_s:
            return
        self._reported = time.monotonic()
        self.reports += 1
        backlog, debtors = await self._broker.backlog(), await self._debtors()
        owed_by = "; ".join(debtors[:3])
        self._say(in_words(Awaited(awaited, owed_by, _REMEDY), self.waited_s))
        self._log.warning(
            "learner is waiting",
            awaited=awaited,
            since_s=round(self.waited_s, 1),
            owed_by=debtors,
            generating=backlog.running_rollouts,
            open_rollouts=backlog.open_rollouts,
            queued_tickets=backlog.queued_tickets,
            grading_jobs=backlog.grading_jobs,
            paused_feeding=backlog.paused_feeding,
            remedy=_REMEDY,
            **details,
        )

    async def _debtors(self) -> list[str]:
        """Other roles' sessions, the longest silent first; says so when there are none."""
        sessions = [one for one in await self._broker.sessions() if one["role"] != "learner"]
        sessions.sort(key=lambda one: -int(one["age_ms"]))
        named = [
            f"{one['role']} {one.get('worker', one['id'])}: {one['leases']} leases, "
            f"heartbeat {one['age_ms']} ms ago"
            for one in sessions[:8]
        ]
        return named or ["nobody: no coordinator and no worker has a session"]
