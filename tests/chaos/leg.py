"""One run under faults from its first step to its last: the leg of a chaos run."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from .deliver import GRACE_S, Hand, Under
from .faults import Fault, schedule
from .losses import Losses
from .stage import Stage
from .watch import LOCK_ROLES, Look, Watch

TICK_S = 0.05
SAY_EVERY_S = 10.0
STILL_S = 300.0
"""Without a prompt fed or a step trained for so long, faults or not, a run hangs."""
CLOSE_TO_END = 0.97
"""Of the prompts fed, after which nothing is done any more: what is left goes by undisturbed."""
_LOOK_AHEAD = 8
_DISK_EXIT_S = 60.0
"""A run that gives up drains first, for which it has this long."""
_DISK_EXITS = (3, 7)
"""How ``up`` ends when a disk is full: the machine is to be mended, then the command repeated."""


class LegError(Exception):
    """The run hung, or ended as no fault explains."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """``what`` was killed and at work again ``took_s`` later."""

    what: str
    took_s: float


@dataclass
class Tally:
    """What was done to one run and what it cost."""

    seed: int
    delivered: list[Under] = field(default_factory=list)
    unfelt: list[Fault] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    recoveries: list[Recovery] = field(default_factory=list)
    restarts_of_up: int = 0
    took_s: float = 0.0

    def by_kind(self) -> Counter[str]:
        """Confirmed faults by kind and target."""
        return Counter(f"{u.fault.kind} {u.role.rpartition('-')[0] or u.role}"
                       for u in self.delivered)  # fmt: skip


class Leg:
    """Drives one run. Consumes a schedule; ends with the run, or raises ``LegError``."""

    def __init__(self, stage: Stage, seed: int, wanted: int, say: Callable[[str], None]) -> None:
        self.tally = Tally(seed)
        self._stage, self._wanted, self._say = stage, wanted, say
        self._faults: Iterator[Fault] = schedule(seed)
        self._next: deque[Fault] = deque()
        self._under: list[Under] = []
        self._healing: list[tuple[str, int, float]] = []
        self._next_s = 0.0
        self._marks: dict[str, int] = {}
        self._disk_s = float("-inf")
        self.watch = Watch(stage)
        self.losses = Losses(self.watch, stage.trace)
        self._hand = Hand(stage, self.watch, self.losses)

    def run(self, prompts: int) -> Tally:
        """Faults until ``prompts`` are nearly fed or enough were felt; then to the run's end."""
        began_s = moved_s = said_s = time.monotonic()
        mark = (0, 0, 0)
        self._stage.start()
        try:
            while True:
                code = self._stage.exit_code()
                if code == 0:
                    break
                if code is not None:
                    self._start_again(code)
                look, now_s = self.watch.look, time.monotonic()
                if (look.step, look.fed, look.redis_pid) != mark:
                    mark, moved_s = (look.step, look.fed, look.redis_pid), now_s
                if now_s - moved_s > STILL_S:
                    raise LegError(f"nothing was fed or trained for {STILL_S:.0f} s")
                if now_s - said_s > SAY_EVERY_S:
                    said_s = now_s
                    self._say(self._progress(now_s - began_s, prompts))
                enough = len(self.tally.delivered) >= self._wanted
                self._tick(look, now_s, more=not enough and look.fed < CLOSE_TO_END * prompts)
                time.sleep(TICK_S)
        finally:
            for under in self._under:
                under.undo()
            self.watch.close()
        self.tally.took_s = time.monotonic() - began_s
        return self.tally

    def _tick(self, look: Look, now_s: float, *, more: bool) -> None:
        self._see_healing(look, now_s)
        self.losses.look()
        for under in list(self._under):
            self._see(under, look, now_s)
        if more and now_s >= self._next_s and look.step > 0:
            self._hit(look, now_s)

    def _hit(self, look: Look, now_s: float) -> None:
        """Deliver the first of the next few faults whose target can be hit now.

        Coordinator and learner, of which there is one, are hit again when the run has got on since:
        killed faster than they start, nothing would be shown but that.
        """
        while len(self._next) < _LOOK_AHEAD:
            fault = next(self._faults)
            if fault.kind in self._stage.skipped:
                self.tally.skipped[fault.kind] += 1
            else:
                self._next.append(fault)
        busy = {under.role for under in self._under}
        moved = {"coordinator": look.fed, "learner": look.step}
        for fault in list(self._next):
            if self._marks.get(fault.target, -1) == moved.get(fault.target):
                continue
            under = self._hand.begin(fault, busy)
            if under is None:
                continue
            self._next.remove(fault)
            self._next_s = now_s + self._next[0].after_s
            self._under.append(under)
            if fault.target in moved:
                self._marks[fault.target] = moved[fault.target]
            if fault.kind == "disk":
                self._disk_s = float("inf")
            if fault.kind == "kill":
                self._note_kill(under.role, now_s)
            return

    def _see(self, under: Under, look: Look, now_s: float) -> None:
        """Ask whether it was felt; end it when it has lasted."""
        try:
            under.is_felt = under.is_felt or under.felt(look)
        except Exception as error:  # Redis or the process may be gone at this very moment
            if not _is_passing(error):
                raise
        due = now_s >= under.ends_s and (under.is_felt or now_s > under.ends_s + GRACE_S)
        if not due:
            return
        under.undo()
        self._under.remove(under)
        if under.fault.kind == "disk":
            self._disk_s = now_s
        if under.is_felt:
            self.tally.delivered.append(under)
        else:
            self.tally.unfelt.append(under.fault)
            self._say(f"not felt, not counted: {under.fault} ({under.role})")

    def _note_kill(self, role: str, now_s: float) -> None:
        pid = self.watch.look.redis_pid if role == "redis" else self.watch.pids.get(role, 0)
        self._healing.append((role, pid, now_s))

    def _see_healing(self, look: Look, now_s: float) -> None:
        for one in list(self._healing):
            role, pid, began_s = one
            if self._is_healed(role, pid, look):
                what = role.rpartition("-")[0] or role
                self.tally.recoveries.append(Recovery(what, now_s - began_s))
                self._healing.remove(one)

    def _is_healed(self, role: str, pid: int, look: Look) -> bool:
        """Redis answers; another process holds the lock; the restarted one works."""
        if role == "redis":
            return look.redis_pid not in (0, pid)
        name = role.rpartition("-")[0]
        if name in LOCK_ROLES:
            holder = look.holders.get(name, 0)
            return holder not in (0, pid) and holder in look.sessions
        new = self.watch.pids.get(role, 0)
        session = look.sessions.get(new)
        if new == pid or session is None:
            return False
        return name != "worker" or session.generated > 0

    def _start_again(self, code: int) -> None:
        """``up`` gave up. With a full disk it should: free the disk and repeat the command."""
        disk_is_why = time.monotonic() - self._disk_s < _DISK_EXIT_S
        if code not in _DISK_EXITS or not disk_is_why:
            raise LegError(f"ringasync up ended with exit code {code}")
        for disk in self._stage.disks:
            self._stage.free(disk)
        self.tally.restarts_of_up += 1
        self._healing.clear()
        self._say(f"up ended with exit code {code} on a full disk: freed, started again")
        self._stage.start()

    def _progress(self, at_s: float, prompts: int) -> str:
        look, felt = self.watch.look, len(self.tally.delivered)
        now = ", ".join(f"{u.fault.kind} {u.role}" for u in self._under) or "nothing"
        return (
            f"[{at_s:4.0f} s] seed {self.tally.seed}: {felt} faults felt of {self._wanted}, "
            f"step {look.step}, {look.fed} of {prompts} prompts fed; now: {now}"
        )


def _is_passing(error: Exception) -> bool:
    import redis

    return isinstance(error, (redis.RedisError, OSError))
