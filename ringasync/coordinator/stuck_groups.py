"""Groups that cannot complete while everything around them moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ringasync.broker.types import Backlog, Poll
from ringasync.clock import monotonic_s
from ringasync.coordinator.seat import Seat
from ringasync.observability.stalls import Awaited, StallClock

OLDEST = 256
"""So many open groups are looked at: one that is stuck becomes one of the oldest."""
_MOST_SHOWN = 3
Members = Mapping[str, Mapping[str, str]]
"""Rollout -> fields, see ``Broker.open_groups``."""

_REMEDY = (
    "`ringasync inspect ROLLOUT` shows its life; ending whoever owes it hands it to others, and "
    "after worker.max_attempts tries its group is quarantined"
)


class StuckGroups:
    """Looks at the oldest open groups four times within ``stall_report_s``.

    A group is stuck when some of its rollouts make no progress for ``stall_report_s`` while they
    could: nothing is paused, nobody else has the device, and they are not just queueing.
    """

    def __init__(self, seat: Seat, clock: Callable[[], float] = monotonic_s) -> None:
        self._seat, self._clock = seat, clock
        deadline_s = seat.config.observability.stall_report_s
        self._every_s = deadline_s / 4
        self._stalls = StallClock(deadline_s, clock)
        self._looked_s = clock() - self._every_s
        self._last = ""

    async def look(self, poll: Poll, backlog: Backlog) -> str:
        """The stuck groups in words, or nothing; what was found last while it is not time yet."""
        if self._clock() - self._looked_s < self._every_s:
            return self._last
        self._looked_s = self._clock()
        groups = {} if may_stand_still(poll) else await self._seat.broker.open_groups(OLDEST)
        self._last = self._stalls.look(stuck(groups, backlog))
        return self._last


def may_stand_still(poll: Poll) -> bool:
    """Whether rollouts have a reason to make no progress: a pause, the learner's turn."""
    return poll.paused or poll.device_turn % 2 == 1 or poll.round_state in ("closing", "training")


def stuck(groups: Mapping[str, Members], backlog: Backlog) -> dict[str, Awaited]:
    """What each group awaits that somebody owes; the rest of a group's members may be graded."""
    found = {}
    for group_id, members in groups.items():
        owed = {
            rollout_id: debtor
            for rollout_id, fields in members.items()
            if (debtor := _debtor(fields, backlog))
        }
        if owed:
            found[group_id] = _awaited(group_id, members, owed)
    return found


def _awaited(group_id: str, members: Members, owed: Mapping[str, str]) -> Awaited:
    shown = ", ".join(f"{name} ({members[name]['state']})" for name in list(owed)[:_MOST_SHOWN])
    more = f" and {len(owed) - _MOST_SHOWN} more" if len(owed) > _MOST_SHOWN else ""
    return Awaited(
        f"group {group_id} to complete: {shown}{more}",
        ", ".join(sorted(set(owed.values()))),
        _REMEDY,
        # Any step of any of them is progress of the group.
        tuple((name, tuple(fields.values())) for name, fields in members.items()),
    )


def _debtor(fields: Mapping[str, str], backlog: Backlog) -> str:
    """Who has the next move with a rollout; nobody while it is in a queue that may be long."""
    state, worker = fields["state"], fields["worker"]
    if state == "leased":
        return f"worker session {worker}"
    if state == "grading":
        return f"the grader in session {worker}"
    if state in ("queued", "parked") and not backlog.queued_tickets:
        return "nobody: it has no ticket (see `ringasync audit`)"
    if state == "finished":
        return f"the graders, with {backlog.grading_jobs} jobs before them"
    return ""
