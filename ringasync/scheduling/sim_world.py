"""The world of the scheduling simulation: lengths, rollouts, workers and their failures, no policy.

Discrete events on a heap, no engine, no clock: hundreds of learner steps in about a second. Times
are simulated seconds. Everything is drawn from one seeded generator, so a seed gives one history.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol

import numpy as np

GroupEnd = Literal["", "trained", "filtered", "stale", "purged"]


class LengthModel(Protocol):
    """Draws the lengths of one group's rollouts, in tokens (>= 1)."""

    def __call__(
        self, rng: np.random.Generator, group_index: int, size: int, /
    ) -> Sequence[int]: ...


@dataclass(frozen=True, slots=True)
class HeavyTail:
    """Lognormal or Pareto lengths with a mean, a tail, a cap, and a drift over the run.

    ``tail`` is the deviation of the log for ``lognormal`` and the exponent (> 1) for ``pareto``.
    The mean moves linearly to ``mean * drift`` over ``drift_groups`` groups.
    """

    kind: Literal["lognormal", "pareto"] = "lognormal"
    mean_tokens: float = 100.0
    tail: float = 1.0
    cap_tokens: int = 2000
    drift: float = 1.0
    drift_groups: int = 1000

    def __call__(self, rng: np.random.Generator, group_index: int, size: int) -> Sequence[int]:
        share = min(1.0, group_index / self.drift_groups)
        mean = self.mean_tokens * (1 + (self.drift - 1) * share)
        if self.kind == "lognormal":
            drawn = rng.lognormal(np.log(mean) - self.tail**2 / 2, self.tail, size)
        else:
            drawn = mean * (self.tail - 1) / self.tail * (1 + rng.pareto(self.tail, size))
        return [int(x) for x in np.clip(np.rint(drawn), 1, self.cap_tokens)]


@dataclass(slots=True, eq=False)
class SimRollout:
    """One rollout: its drawn length, what it has, and the learner step of its first token."""

    group: SimGroup
    length: int
    tokens: int = 0
    first_step: int = -1
    retention: int = 0
    finished: bool = False
    graded: bool = False


@dataclass(slots=True, eq=False)
class SimGroup:
    """One prompt with its rollouts."""

    index: int
    rollouts: list[SimRollout] = field(default_factory=list)
    num_tokens: int = 0
    graded: int = 0
    end: GroupEnd = ""

    @property
    def first_step(self) -> int:
        return min(r.first_step for r in self.rollouts)


@dataclass(slots=True, eq=False)
class SimWorker:
    """``slots`` rollouts at ``tokens_per_s`` each; ``life`` voids the events of an earlier life."""

    tokens_per_s: float
    slots: int
    loaded_step: int = 0
    alive: bool = True
    life: int = 0
    active: dict[SimRollout, tuple[float, int]] = field(default_factory=dict)
    """Rollout to (start time, lease number)."""


@dataclass(frozen=True, slots=True)
class WorldSettings:
    """Workers as (tokens/s a slot, slots); delays; failures a second and worker; repair time."""

    workers: tuple[tuple[float, int], ...] = ((50.0, 32), (50.0, 32))
    group_size: int = 8
    grading_s: float = 0.05
    swap_s: float = 0.1
    failures_per_s: float = 0.0
    repair_s: float = 5.0
    flush_tokens: int = 64


class World:
    """Rollouts on workers. Calls ``on_graded(rollout)`` when a finished rollout has its verdict."""

    def __init__(self, settings: WorldSettings, lengths: LengthModel, seed: int) -> None:
        self.settings = settings
        self.lengths = lengths
        self.rng = np.random.default_rng(seed)
        self.now = 0.0
        self.groups: list[SimGroup] = []
        self.queue: deque[SimRollout] = deque()
        self.workers = [SimWorker(speed, slots) for speed, slots in settings.workers]
        self.accepting = True
        self.grading = 0
        self.unfinished = 0
        self.generated = 0
        self.regenerated = 0
        self.published_step = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        for worker in self.workers:
            self._plan_failure(worker)
        self.on_graded: Callable[[SimRollout], None] = lambda _rollout: None

    def at(self, delay_s: float, action: Callable[[], None]) -> None:
        """Do ``action`` after ``delay_s``."""
        heapq.heappush(self._events, (self.now + delay_s, next(self._numbers), action))

    def advance(self) -> bool:
        """Do every event of the next moment; False when there is none: a deadlock or the end."""
        if not self._events:
            return False
        self.now = self._events[0][0]
        while self._events and self._events[0][0] <= self.now:
            heapq.heappop(self._events)[2]()
        return True

    def admit(self) -> SimGroup:
        """Feed one prompt: its rollouts are queued."""
        group = SimGroup(len(self.groups))
        drawn = self.lengths(self.rng, group.index, self.settings.group_size)
        group.rollouts = [SimRollout(group, length) for length in drawn]
        group.num_tokens = sum(drawn)
        self.groups.append(group)
        self.queue.extend(group.rollouts)
        self.unfinished += len(group.rollouts)
        return group

    def lease(self) -> None:
        """Free slots of living workers take queued rollouts, the emptiest worker first."""
        while self.accepting and self.queue:
            free = [w for w in self.workers if w.alive and len(w.active) < w.slots]
            if not free:
                return
            worker = min(free, key=lambda w: len(w.active) / w.slots)
            self._start(worker, self.queue.popleft())

    def park_all(self) -> None:
        """Close a round: every leased rollout goes back with what it has, retention + 1 for all."""
        self.accepting = False
        for worker in self.workers:
            for rollout in list(worker.active):
                self._stop(worker, rollout, lose_tail=False)
        for rollout in self.queue:
            rollout.retention += 1

    def unfinished_tokens(self) -> int:
        """What rollouts that are not finished hold by now."""
        parked = sum(r.tokens for r in self.queue)
        for worker in self.workers:
            for rollout, (started, _) in worker.active.items():
                parked += rollout.tokens + int((self.now - started) * worker.tokens_per_s)
        return parked

    def drop(self, group: SimGroup) -> None:
        """Take a group's unfinished rollouts out of the queue (purge)."""
        gone = {r for r in group.rollouts if not r.finished}
        self.queue = deque(r for r in self.queue if r not in gone)
        self.unfinished -= len(gone)

    def publish(self, learner_step: int) -> None:
        """Every worker loads the new version after ``swap_s``; rollouts go on under it."""
        self.published_step = learner_step
        for worker in self.workers:
            self.at(self.settings.swap_s, partial(self._load, worker, worker.life, learner_step))

    def _load(self, worker: SimWorker, life: int, learner_step: int) -> None:
        if worker.life == life and worker.alive:
            worker.loaded_step = max(worker.loaded_step, learner_step)

    def _start(self, worker: SimWorker, rollout: SimRollout) -> None:
        number = next(self._numbers)
        worker.active[rollout] = (self.now, number)
        if rollout.tokens == 0:
            rollout.first_step = worker.loaded_step
        remaining_s = (rollout.length - rollout.tokens) / worker.tokens_per_s
        self.at(remaining_s, lambda: self._finish(worker, rollout, number))

    def _stop(self, worker: SimWorker, rollout: SimRollout, *, lose_tail: bool) -> None:
        started, _ = worker.active.pop(rollout)
        made = int((self.now - started) * worker.tokens_per_s + 1e-6)
        made = min(made, rollout.length - rollout.tokens - 1)
        lost = min(made, int(self.rng.integers(0, self.settings.flush_tokens))) if lose_tail else 0
        rollout.tokens += made - lost
        self.generated += made - lost
        self.regenerated += lost
        self.queue.appendleft(rollout)

    def _finish(self, worker: SimWorker, rollout: SimRollout, number: int) -> None:
        if worker.active.get(rollout, (0.0, -1))[1] != number:
            return
        del worker.active[rollout]
        self.generated += rollout.length - rollout.tokens
        rollout.tokens = rollout.length
        rollout.finished = True
        self.unfinished -= 1
        self.grading += 1
        self.at(self.settings.grading_s, lambda: self._graded(rollout))

    def _graded(self, rollout: SimRollout) -> None:
        self.grading -= 1
        rollout.graded = True
        rollout.group.graded += 1
        self.on_graded(rollout)

    def _plan_failure(self, worker: SimWorker) -> None:
        if self.settings.failures_per_s > 0:
            delay = float(self.rng.exponential(1 / self.settings.failures_per_s))
            self.at(delay, lambda: self._fail(worker))

    def _fail(self, worker: SimWorker) -> None:
        worker.alive = False
        worker.life += 1
        for rollout in list(worker.active):
            self._stop(worker, rollout, lose_tail=True)
        self.at(self.settings.repair_s, lambda: self._repair(worker))

    def _repair(self, worker: SimWorker) -> None:
        worker.alive = True
        worker.loaded_step = self.published_step
        self._plan_failure(worker)
