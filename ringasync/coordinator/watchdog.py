"""Stall reports: what is awaited, who owes it, since when."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ringasync.broker.types import Backlog, Poll
from ringasync.coordinator.seat import Seat
from ringasync.coordinator.stuck_groups import StuckGroups
from ringasync.observability.log import get_logger
from ringasync.observability.stalls import Awaited, in_words, together

log = get_logger(__name__)
_REMEDY = "its log in runs/NAME/logs says why; when it is ended, another goes on where it was"
_FULL = "Redis is full"
"""What a worker says that keeps tokens because its appends are refused."""
Session = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Situation:
    """What the watchdog judges by, read at one moment."""

    poll: Poll
    backlog: Backlog
    ledger: Mapping[str, int]
    budget_tokens: int
    evaluation: str
    redis_full: bool
    doing: str
    publication_blocked: str = ""
    """Why no version can be published; read when a stall is to be reported."""


@dataclass(frozen=True, slots=True)
class Stall:
    """One sentence each: what is awaited and who owes it."""

    awaited: str
    owed_by: str


class Watchdog:
    """Compares one moment with the next; reports when nothing moves for ``stall_report_s``."""

    def __init__(self, seat: Seat) -> None:
        self._seat = seat
        self._after_s = seat.config.observability.stall_report_s
        self._seen: tuple[object, ...] = ()
        self._moved_s = self._reported_s = time.monotonic()
        self._groups = StuckGroups(seat)
        self._still = ""
        self.reports = 0

    async def look(self, now: Situation) -> Stall | None:
        """Take note; the stall when it is time to report one. All that is overdue is shown."""
        stall = await self._nothing_moves(now)
        groups = await self._groups.look(now.poll, now.backlog)
        self._seat.status["stall"] = together((self._still, groups))
        return stall

    async def _nothing_moves(self, now: Situation) -> Stall | None:
        moving = (
            tuple(sorted(now.ledger.items())),
            now.poll.learner_step,
            now.poll.latest_version,
            now.poll.round_id,
            now.poll.round_state,
            now.poll.phase,
            now.evaluation,
            now.backlog,
        )
        at = time.monotonic()
        if moving != self._seen:
            self._seen, self._moved_s, self._reported_s = moving, at, at
            self._still = ""
            return None
        if at - self._reported_s < self._after_s:
            return None
        self._reported_s = at
        self.reports += 1
        broker = self._seat.broker
        blocked = (await broker.run_meta()).get("publication_blocked", "")
        stall = judge(replace(now, publication_blocked=blocked), await broker.sessions())
        since_s = round(at - self._moved_s, 1)
        log.warning(
            "nothing moves",
            awaited=stall.awaited,
            owed_by=stall.owed_by,
            since_s=since_s,
            remedy=_REMEDY,
        )
        self._still = in_words(Awaited(stall.awaited, stall.owed_by, _REMEDY), since_s)
        return stall


def judge(now: Situation, sessions: Sequence[Session]) -> Stall:
    """Who has the next move. The order is that of the data's way, seen from its hindrances."""
    return (
        _halted(now, sessions)
        or _device_owed(now, sessions)
        or _owed_by_learner(now, sessions)
        or _owed_by_workers(now, sessions)
        or Stall(f"the coordinator's next turn ({now.doing})", "the coordinator")
    )


def _halted(now: Situation, sessions: Sequence[Session]) -> Stall | None:
    if now.poll.paused:
        return Stall("the run to be resumed", "whoever paused it: `ringasync resume`")
    if now.backlog.paused_feeding:
        cause = now.backlog.paused_feeding
        return Stall(f"feeding to be resumed: {cause}", "a person: `ringasync resume` once mended")
    if now.publication_blocked:
        awaited = f"publication to be unblocked: {now.publication_blocked}"
        return Stall(awaited, "a person: `ringasync resume` once mended")
    if now.redis_full or any(_FULL in row.get("doing", "") for row in sessions):
        return Stall("memory in Redis", "the learner, which frees it, or a larger maxmemory")
    return None


def _device_owed(now: Situation, sessions: Sequence[Session]) -> Stall | None:
    """``schedule.colocated``: who is on a device that it is to leave, or who never came for it."""
    turn = now.poll.device_turn
    if turn % 2 == 0:
        asleep = [row for row in sessions if int(row.get("asleep_turn", "0")) > 0]
        if not asleep:
            return None
        return Stall("workers that have the device again to wake", _describe(asleep, "worker"))
    awake = [row for row in sessions if int(row.get("asleep_turn", "0")) != turn]
    if _any(awake, "worker"):
        return Stall(f"the device for the learner (turn {turn})", _describe(awake, "worker"))
    return Stall(
        f"the learner to hand the device back (turn {turn})", _describe(sessions, "learner")
    )


def _owed_by_learner(now: Situation, sessions: Sequence[Session]) -> Stall | None:
    learner = _describe(sessions, "learner")
    if now.poll.latest_version == 0:
        return Stall("the first policy version", learner)
    if now.poll.round_state == "training":
        return Stall(f"round {now.poll.round_id} to be trained", learner)
    waiting = now.backlog.ready_tokens + now.backlog.reserved_tokens + now.backlog.taken_tokens
    if now.poll.phase == "running" and waiting >= now.budget_tokens:
        return Stall(f"a step on {waiting} waiting tokens", learner)
    return None


def _owed_by_workers(now: Situation, sessions: Sequence[Session]) -> Stall | None:
    backlog, workers = now.backlog, _describe(sessions, "worker")
    if backlog.grading_jobs:
        graders = _describe(sessions, "grader") if _any(sessions, "grader") else workers
        return Stall(f"verdicts on {backlog.grading_jobs} finished rollouts", graders)
    if backlog.running_rollouts:
        return Stall(f"tokens of {backlog.running_rollouts} leased rollouts", workers)
    if backlog.eval_open:
        return Stall(f"{backlog.eval_open} held-out rollouts ({now.evaluation})", workers)
    if backlog.open_rollouts:
        return Stall(f"{backlog.open_rollouts} rollouts to be taken", workers)
    return None


def _any(sessions: Sequence[Session], role: str) -> bool:
    return any(row.get("role") == role for row in sessions)


def _describe(sessions: Sequence[Session], role: str) -> str:
    rows = sorted(
        (row for row in sessions if row.get("role") == role),
        key=lambda row: -int(row.get("age_ms", "0")),
    )
    if not rows:
        return f"nobody: no {role} has a session"
    shown = ", ".join(
        f"{row.get('worker', row.get('id', '?'))} ({row.get('doing', '?')}, "
        f"{row.get('leases', '0')} leases, heartbeat {row.get('age_ms', '?')} ms ago)"
        for row in rows[:4]
    )
    return shown + (f" and {len(rows) - 4} more" if len(rows) > 4 else "")
