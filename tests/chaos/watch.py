"""Looks at Redis and at the processes many times a second; what it saw is on one clock.

The broker's clock may be off the machine's (faults move it) but never falls, so pairs of both are
kept and ``wall_of`` turns a broker's time into one that processes' times can be compared with.
"""

from __future__ import annotations

import json
import re
import threading
import time
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from ringasync.broker.core import pairs, script_source, text
from ringasync.broker.keys import Keys

from .stage import RUN, Stage

LOOK_EVERY_S = 0.05
_ANSWER_S = 0.5
LOCK_ROLES = ("coordinator", "learner")
_OWNER_PID = re.compile(r":(\d+)$")


@dataclass(frozen=True, slots=True)
class Session:
    """A living session: whose, and what it holds."""

    session_id: str
    role: str
    pid: int
    generated: int


@dataclass
class Look:
    """The run as it was at ``at_s`` (monotonic): sessions by process, lock holders by role."""

    at_s: float = 0.0
    sessions: dict[int, Session] = field(default_factory=dict)
    holders: dict[str, int] = field(default_factory=dict)
    redis_pid: int = 0
    log_fails: bool = False
    """Redis could not write its append-only file."""
    step: int = 0
    fed: int = 0
    """Prompts that were fed so far."""
    phase: str = ""

    @property
    def answers(self) -> bool:
        """Whether Redis did."""
        return self.redis_pid != 0


class Watch:
    """A thread that looks. ``look`` is the newest; ``pids`` the processes by role name."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.keys = Keys(RUN)
        self.look = Look()
        self.pids: dict[str, int] = {}
        self.seen_pids: set[int] = set()
        """Processes that have had a session: they were really at work."""
        self.holders: dict[str, int] = {}
        """The newest known holder of each lock, also while Redis does not answer."""
        self._clock: deque[tuple[int, int]] = deque(maxlen=200_000)
        self._client: redis.Redis | None = None
        self._port = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def client(self) -> redis.Redis:
        """A client of the run's Redis, past the proxy. Raises ``redis`` errors and ``OSError``."""
        port = self._stage.redis_port()
        if self._client is None or port != self._port:
            self._client = redis.Redis(
                port=port,
                socket_timeout=_ANSWER_S,
                socket_connect_timeout=_ANSWER_S,
                retry=Retry(NoBackoff(), 0),
            )
            self._port = port
        return self._client

    def wall_of(self, broker_ms: int) -> int:
        """The machine's time, in ms, at which the broker's clock stood at ``broker_ms``."""
        clock = list(self._clock)
        place = min(bisect_left(clock, (broker_ms, 0)), len(clock) - 1)
        return clock[place][1] - (clock[place][0] - broker_ms)

    def _run(self) -> None:
        while not self._stop.wait(LOOK_EVERY_S):
            self.pids = self._stage.pids()
            try:
                self.look = self._see(self.client())
            except (redis.RedisError, OSError, ValueError):
                self.look = Look(at_s=time.monotonic(), step=self.look.step, fed=self.look.fed)
                continue
            self.seen_pids |= self.look.sessions.keys()
            self.holders |= self.look.holders

    def _see(self, client: redis.Redis) -> Look:
        keys = self.keys
        with client.pipeline(transaction=False) as pipe:
            pipe.zrange(keys.sessions, 0, -1)
            for role in LOCK_ROLES:
                pipe.hget(keys.lock(role), "owner")
            pipe.hmget(keys.meta, "learner_step", "phase", "cursor")
            pipe.info("server")
            pipe.info("persistence")
            pipe.eval(script_source("clock", False).decode(), 1, keys.prefix)
            ids, *owners, meta, info, persistence, now_ms = pipe.execute()
        self._clock.append((int(now_ms), time.time_ns() // 1_000_000))
        with client.pipeline(transaction=False) as pipe:
            for raw in ids:
                pipe.hgetall(keys.session(text(raw)))
            rows = [pairs(reply) for reply in pipe.execute()]
        sessions = {}
        for raw, row in zip(ids, rows, strict=True):
            pid = _pid(row.get("pid") or row.get("worker", ""))
            if pid:
                sessions[pid] = Session(
                    text(raw), row.get("role", ""), pid, int(row.get("tokens_generated", 0))
                )
        return Look(
            at_s=time.monotonic(),
            sessions=sessions,
            holders={
                role: _pid(text(owner))
                for role, owner in zip(LOCK_ROLES, owners, strict=True)
                if owner
            },
            redis_pid=int(info["process_id"]),
            log_fails=persistence.get("aof_last_write_status") == "err",
            step=int(meta[0] or 0),
            fed=json.loads(meta[2])["next"] if meta[2] else 0,
            phase=text(meta[1] or b""),
        )


def _pid(owner: str) -> int:
    found = _OWNER_PID.search(f":{owner}" if owner.isdecimal() else owner)
    return int(found[1]) if found else 0
