"""How each kind of fault is delivered, undone, and confirmed to have been felt."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil
import redis

from .faults import Fault
from .losses import Losses
from .stage import Stage
from .watch import LOCK_ROLES, Look, Watch

GRACE_S = 45.0
"""How long an effect is waited for beyond the fault's own time before it is not counted. Together
they stay below ``redis.retry_budget_s``, after which a role that is cut off rightly gives up."""
_CLOCK_NEAR_S = 4.0
_FULL_DISK = "No space left on device"


@dataclass
class Under:
    """A fault at work. ``felt`` is asked at every look and stays true; ``undo`` ends it.

    With ``wants`` the fault goes on, beyond ``ends_s``, until it has been felt.
    """

    fault: Fault
    role: str
    ends_s: float
    felt: Callable[[Look], bool]
    undo: Callable[[], None] = lambda: None
    wants: bool = True
    is_felt: bool = False
    began_s: float = field(default_factory=time.monotonic)


class Hand:
    """Delivers faults. ``begin`` gives None while the target cannot be hit."""

    def __init__(self, stage: Stage, watch: Watch, losses: Losses) -> None:
        self._stage, self._watch, self._losses = stage, watch, losses

    def begin(self, fault: Fault, busy: set[str]) -> Under | None:
        """Do it to a target that is at work and not in ``busy``."""
        kinds: dict[str, Callable[[Fault, str], Under | None]] = {
            "kill": self._kill,
            "zombie": self._zombie,
            "stop": self._stop_redis,
            "full": self._fill_redis,
            "cut": self._cut,
            "delay": self._delay,
            "partition": self._partition,
            "disk": self._fill_disk,
            "clock": self._move_clock,
        }
        role = self._choose(fault, busy)
        try:
            return kinds[fault.kind](fault, role) if role else None
        except (redis.RedisError, ProcessLookupError, psutil.NoSuchProcess, FileNotFoundError):
            return None

    def _choose(self, fault: Fault, busy: set[str]) -> str:
        """Name of the target: ``redis``, or a role whose process has been at work."""
        if fault.target == "redis" or fault.kind == "disk":
            ready = [fault.target] if self._watch.look.answers else []
        else:
            ready = [name for name, pid in self._watch.pids.items() if self._is_ready(name, pid)]
            if fault.target != "any":
                ready = [name for name in ready if name.rpartition("-")[0] == fault.target]
        free = sorted(name for name in ready if name not in busy)
        draw = random.Random(fault.number)
        return draw.choice(free) if free else ""

    def _is_ready(self, name: str, pid: int) -> bool:
        role = name.rpartition("-")[0]
        if role in LOCK_ROLES and self._watch.holders.get(role) != pid:
            return False  # a standby, or one that has not taken its seat yet
        return pid in self._watch.seen_pids

    # Processes.

    def _kill(self, fault: Fault, role: str) -> Under:
        pid = self._watch.look.redis_pid if role == "redis" else self._watch.pids[role]
        os.kill(pid, signal.SIGKILL)
        if role.startswith("worker"):
            self._wait(lambda: not _lives(pid))
            self._losses.probe(fault.number, pid)
        return Under(fault, role, time.monotonic(), lambda _: not _lives(pid))

    def _zombie(self, fault: Fault, role: str) -> Under | None:
        pid = self._watch.pids[role]
        session = self._watch.look.sessions.get(pid)
        if session is None:
            return None
        os.kill(pid, signal.SIGSTOP)
        self._wait(lambda: _is_stopped(pid))
        if role.startswith("worker"):
            self._losses.probe(fault.number, pid)
        gone = self._lost_its_lock if role.rpartition("-")[0] in LOCK_ROLES else self._lost_lease
        return Under(
            fault,
            role,
            time.monotonic() + fault.lasts_s,
            lambda look: _is_stopped(pid) and look.answers and gone(role, pid, session.session_id),
            lambda: _signal(pid, signal.SIGCONT),
        )

    def _lost_lease(self, _role: str, _pid: int, session_id: str) -> bool:
        """It is dead, or an incarnation ended it."""
        key = self._watch.keys.session(session_id)
        return self._watch.client().hget(key, "state") not in (None, b"alive")

    def _lost_its_lock(self, role: str, pid: int, _session_id: str) -> bool:
        """Another holds it, or its deadline has passed."""
        name = role.rpartition("-")[0]
        if self._watch.look.holders.get(name) != pid:
            return True
        deadline = self._watch.client().hget(self._watch.keys.lock(name), "deadline")
        return self._watch.wall_of(int(deadline or 0)) < time.time() * 1000

    def _wait(self, condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + 5.0
        while not condition() and time.monotonic() < deadline_s:
            time.sleep(0.005)

    # Redis.

    def _stop_redis(self, fault: Fault, role: str) -> Under:
        pid = self._watch.look.redis_pid
        os.kill(pid, signal.SIGSTOP)
        return Under(
            fault,
            role,
            time.monotonic() + fault.lasts_s,
            lambda _: _is_stopped(pid),
            lambda: _signal(pid, signal.SIGCONT),
        )

    def _fill_redis(self, fault: Fault, role: str) -> Under:
        client = self._watch.client()
        before = client.config_get("maxmemory")["maxmemory"] or 0
        client.config_set("maxmemory", 1 << 20)
        probe = f"{self._watch.keys.prefix}scratch"

        def is_refused(_: Look) -> bool:
            try:
                self._watch.client().set(probe, "x")
            except redis.ResponseError as error:  # OutOfMemoryError is one
                return "OOM" in str(error) or "maxmemory" in str(error)
            return False

        def undo() -> None:
            with contextlib.suppress(redis.RedisError, OSError):
                self._watch.client().config_set("maxmemory", before)

        return Under(fault, role, time.monotonic() + fault.lasts_s, is_refused, undo)

    # The network.

    def _cut(self, fault: Fault, role: str) -> Under | None:
        severed = self._stage.proxy.cut(role)
        if not severed:
            return None
        return Under(fault, role, time.monotonic(), lambda _: True)

    def _delay(self, fault: Fault, role: str) -> Under:
        link = self._stage.proxy.links[role]
        before, link.delay_s = link.delayed_chunks, fault.size

        def undo() -> None:
            link.delay_s = 0.0

        return Under(
            fault,
            role,
            time.monotonic() + fault.lasts_s,
            lambda _: link.delayed_chunks > before,
            undo,
        )

    def _partition(self, fault: Fault, role: str) -> Under | None:
        proxy, pid = self._stage.proxy, self._watch.pids[role]
        session = self._watch.look.sessions.get(pid)
        if session is None:
            return None
        link = proxy.links[role]
        before = link.held_chunks
        proxy.hold(role, True)

        def felt(look: Look) -> bool:
            held = link.held_chunks > before
            if fault.target == "any":
                return held
            return held and look.answers and self._lost_lease(role, pid, session.session_id)

        return Under(
            fault,
            role,
            time.monotonic() + fault.lasts_s,
            felt,
            lambda: proxy.hold(role, False),
        )

    # Disks and clocks.

    def _fill_disk(self, fault: Fault, role: str) -> Under | None:
        logs = sorted(self._stage.run_dir.glob("logs/learner-*.log"))
        sizes = {log: log.stat().st_size for log in logs}
        if not self._stage.fill(role):
            self._stage.free(role)
            return None

        def learner_felt(_: Look) -> bool:
            return any(_FULL_DISK in _text_after(log, size) for log, size in sizes.items())

        felt = (lambda look: look.log_fails) if role == "redis" else learner_felt
        return Under(
            fault,
            role,
            time.monotonic() + fault.lasts_s,
            felt,
            lambda: self._stage.free(role),
        )

    def _move_clock(self, fault: Fault, role: str) -> Under:
        self._stage.set_clock(role, fault.size)
        metrics = self._stage.run_dir / "metrics.jsonl"

        def redis_felt(look: Look) -> bool:
            return look.answers and self._is_off(self._watch.client().time()[0], fault.size)

        def coordinator_felt(_: Look) -> bool:
            return self._is_off(_newest_snapshot_s(metrics.read_bytes()), fault.size)

        return Under(
            fault,
            role,
            time.monotonic() + fault.lasts_s,
            redis_felt if role == "redis" else coordinator_felt,
            lambda: self._stage.set_clock(role, 0.0),
        )

    def _is_off(self, told_s: float, offset_s: float) -> bool:
        return abs(told_s - time.time() - offset_s) < _CLOCK_NEAR_S


def _newest_snapshot_s(metrics: bytes) -> float:
    """The coordinator's own time when it wrote the newest snapshot; 0 when there is none."""
    lines = metrics.splitlines()
    for raw in reversed(lines[-50:]):
        with contextlib.suppress(ValueError):
            line = json.loads(raw)
            if line.get("kind") == "snapshot":
                first = json.loads(lines[0])
                return float(line["t_s"]) + float(first["at_ms"]) / 1000
    return 0.0


def _text_after(log: os.PathLike[str], size: int) -> str:
    with open(log, "rb") as file:
        file.seek(size)
        return file.read().decode(errors="replace")


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _is_stopped(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
