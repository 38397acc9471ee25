"""Tokens that a fault made others generate again, and how long their rollouts lay idle.

A worker's trace says what its engine sampled, the broker's history what Redis had accepted when
the lease was lost. A process that is dead or stopped changes neither.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis

from ringasync.broker.core import text

from .stage import FLUSH_TOKENS
from .watch import Watch

BOUND_TOKENS = 2 * FLUSH_TOKENS
"""Of one rollout: a flush that is full, and one that is on its way."""
_PATIENCE_S = 90.0


@dataclass(frozen=True, slots=True)
class Loss:
    """One rollout of a worker that a fault hit. ``resumed_s``: until another leased it, or None."""

    fault: int
    rollout: str
    tokens: int
    length: int
    resumed_s: float | None


@dataclass
class Probe:
    """What is known of a worker that was killed or stopped just now."""

    fault: int
    session_id: str
    trace: bytes
    rollouts: frozenset[str]
    at_ms: int
    began_s: float = field(default_factory=time.monotonic)


class Losses:
    """Takes probes; ``found`` grows as the broker's histories tell the rest."""

    def __init__(self, watch: Watch, trace: Path) -> None:
        self._watch, self._trace = watch, trace
        self._open: list[Probe] = []
        self.found: list[Loss] = []
        self.unmeasured = 0
        """Victims of which Redis could not be asked, or whose leases a restart of it made void."""

    def probe(self, fault: int, pid: int) -> None:
        """Look at a worker that a fault has just killed or stopped."""
        session = self._watch.look.sessions.get(pid)
        try:
            if session is None:
                raise OSError("no session is known")
            leases = self._watch.keys.leases(session.session_id)
            rollouts = {text(raw) for raw in self._watch.client().smembers(leases)}
            trace = (self._trace / str(pid)).read_bytes()
        except (redis.RedisError, OSError):
            self.unmeasured += 1
            return
        at_ms = time.time_ns() // 1_000_000
        self._open.append(Probe(fault, session.session_id, trace, frozenset(rollouts), at_ms))

    def look(self) -> None:
        """Settle the probes whose rollouts have all gone on, or that waited too long."""
        waiting = []
        for probe in self._open:
            if not (self._watch.look.answers and self._settle(probe)):
                waiting.append(probe)
        self._open = waiting

    def _settle(self, probe: Probe) -> bool:
        try:
            histories = self._histories(probe.rollouts)
            state = self._watch.client().hget(self._watch.keys.session(probe.session_id), "state")
        except (redis.RedisError, OSError):
            return False
        lives = {rollout: _life(rows, probe.session_id) for rollout, rows in histories.items()}
        waits = any(life.lost_ms and not life.over for life in lives.values())
        patient = time.monotonic() - probe.began_s < _PATIENCE_S
        if patient and (state in (None, b"alive") or waits):
            return False
        lost = {rollout: life for rollout, life in lives.items() if life.lost_ms}
        if probe.rollouts and not lost:
            self.unmeasured += 1
        for rollout, life in lost.items():
            sampled = sampled_tokens(
                probe.trace.decode().splitlines(), rollout, self._watch.wall_of(life.taken_ms)
            )
            resumed_s = None
            if life.resumed_ms:
                resumed_s = (self._watch.wall_of(life.resumed_ms) - probe.at_ms) / 1000
            tokens = max(0, sampled - life.accepted)
            self.found.append(Loss(probe.fault, rollout, tokens, life.accepted, resumed_s))
        return True

    def _histories(self, rollouts: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
        names = list(rollouts)
        with self._watch.client().pipeline(transaction=False) as pipe:
            for name in names:
                pipe.lrange(self._watch.keys.history(name), 0, -1)
            return {
                name: [json.loads(row) for row in rows]
                for name, rows in zip(names, pipe.execute(), strict=True)
            }


@dataclass
class _Life:
    """A rollout since the victim took it: times are the broker's."""

    taken_ms: int = 0
    accepted: int = 0
    lost_ms: int = 0
    resumed_ms: int = 0
    over: bool = False


def _life(rows: list[dict[str, Any]], session_id: str) -> _Life:
    life = _Life()
    for row in rows:
        event, mine = row["event"], row.get("worker") == session_id
        if event == "leased" and mine:
            life = _Life(taken_ms=row["t_ms"], accepted=row["tokens"])
        elif event == "lost" and mine and life.taken_ms:
            life.lost_ms, life.accepted = row["t_ms"], life.accepted + row["tokens"]
        elif life.lost_ms and not life.over:
            life.over = True
            life.resumed_ms = row["t_ms"] if event == "leased" else 0
    return life


def sampled_tokens(trace: Iterable[str], rollout: str, since_ms: int) -> int:
    """Length that the engine had brought ``rollout`` to, by the trace's lines from then on."""
    longest = 0
    for line in trace:
        at_ms, name, tokens, _version = line.split()
        if name == rollout and int(at_ms) >= since_ms:
            longest = max(longest, int(tokens))
    return longest
