"""What the live view shows, read from the broker: also of a run on another machine."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from ringasync.broker.client import Broker
from ringasync.broker.types import Backlog, Outcome
from ringasync.config.schema import Config
from ringasync.errors import BrokerUnreachableError

RECENT_STEPS = 512
_READ_COUNT = 500
_PACE_STEPS = 20
"""Steps whose median interval gives the time to go."""


@dataclass(frozen=True, slots=True)
class EvalMean:
    """One evaluation so far: mean reward of the ``graded`` among ``seen`` held-out prompts."""

    label: str
    reward: float | None
    graded: int
    seen: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The run at one moment. ``steps`` are the newest step metrics, oldest first."""

    run: str
    steps_total: int
    meta: dict[str, str]
    steps: tuple[dict[str, Any], ...]
    evals: tuple[EvalMean, ...]
    backlog: Backlog
    ledger: dict[str, int]
    sessions: tuple[dict[str, str], ...]
    ends: dict[str, int] = field(default_factory=dict)
    """How many training groups ended how, since the view began to read."""
    generated_tokens_per_s: float = 0.0
    eta_s: float | None = None
    problem: str = ""
    """Why this is not fresh, e.g. Redis does not answer."""

    @property
    def learner_step(self) -> int:
        """Finished learner steps."""
        return int(self.meta.get("learner_step") or 0)

    @property
    def phase(self) -> str:
        """``running``, ``finishing`` or ``done``."""
        return self.meta.get("phase", "?")

    @property
    def state(self) -> str:
        """The phase, and whether a person paused the run, in words."""
        return self.phase + (" (paused)" if self.meta.get("paused") == "1" else "")

    def accounts(self) -> Iterator[tuple[str, int, float]]:
        """Every ledger account that holds tokens: name, tokens, share of the accepted ones."""
        accepted = max(1, self.ledger.get("accepted", 0))
        for account, tokens in self.ledger.items():
            if account != "accepted" and tokens:
                yield account, tokens, tokens / accepted

    @property
    def stalls(self) -> list[str]:
        """What roles report as stalled, and why feeding is stopped, in words."""
        reports = [
            f"{row.get('role', '?')} {row.get('worker', row.get('id', '?'))}: {row['stall']}"
            for row in self.sessions
            if row.get("stall")
        ]
        if self.backlog.paused_feeding:
            reports.append(f"feeding is paused: {self.backlog.paused_feeding}")
        if self.meta.get("publication_blocked"):
            reports.append(f"publication is blocked: {self.meta['publication_blocked']}")
        return reports


class SnapshotReader:
    """Reads snapshots; remembers where it is in the metrics and outcomes streams."""

    def __init__(self, broker: Broker, config: Config) -> None:
        self._broker, self._config = broker, config
        self._metrics_id = self._outcomes_id = "0"
        self._steps: deque[tuple[int, dict[str, Any]]] = deque(maxlen=RECENT_STEPS)
        self._evals: dict[str, dict[str, float | None]] = {}
        self._ends: dict[str, int] = defaultdict(int)
        self._accepted: deque[tuple[float, int]] = deque(maxlen=20)

    async def read(self) -> Snapshot:
        """The present state. Raises what the broker raises, e.g. ``BrokerUnreachableError``."""
        broker = self._broker
        meta = await broker.run_meta()
        await self._read_metrics()
        await self._read_outcomes()
        ledger = await broker.ledger()
        self._accepted.append((time.monotonic(), ledger.get("accepted", 0)))
        step = int(meta.get("learner_step") or 0)
        return Snapshot(
            run=self._config.run.name,
            steps_total=self._config.learner.steps,
            meta=meta,
            steps=tuple(line for _, line in self._steps),
            evals=tuple(_eval_mean(label, found) for label, found in self._evals.items()),
            backlog=await broker.backlog(),
            ledger=ledger,
            sessions=tuple(await broker.sessions()),
            ends=dict(self._ends),
            generated_tokens_per_s=_slope(self._accepted),
            eta_s=_eta_s([at_ms for at_ms, _ in self._steps], self._config.learner.steps - step),
        )

    async def _read_metrics(self) -> None:
        while rows := await self._broker.read_metrics(self._metrics_id, _READ_COUNT):
            for entry_id, line in rows:
                self._metrics_id = entry_id
                if line.get("role") == "learner" and "step" in line:
                    self._steps.append((_stream_ms(entry_id), line))
            if len(rows) < _READ_COUNT:
                return

    async def _read_outcomes(self) -> None:
        while rows := await self._broker.read_outcomes(self._outcomes_id, _READ_COUNT):
            for outcome in rows:
                self._outcomes_id = outcome.entry_id
                self._add_outcome(outcome)
            if len(rows) < _READ_COUNT:
                return

    def _add_outcome(self, outcome: Outcome) -> None:
        if outcome.rollout_id:  # replaced: its group goes on
            return
        if outcome.kind != "eval":
            self._ends[outcome.end] += 1
            return
        label = outcome.group_id[1:].rpartition("-")[0]
        reward = outcome.rewards[0] if outcome.end == "evaluated" and outcome.rewards else None
        self._evals.setdefault(label, {})[outcome.group_id] = reward


async def fresh_or_last(reader: SnapshotReader, last: Snapshot | None) -> Snapshot:
    """A new snapshot; while Redis does not answer the last one, with the problem in it.

    Raises ``BrokerUnreachableError`` when there is no last one.
    """
    try:
        return await reader.read()
    except BrokerUnreachableError as error:
        if last is None:
            raise
        return replace(last, problem=str(error))


def _eval_mean(label: str, found: dict[str, float | None]) -> EvalMean:
    rewards = [reward for reward in found.values() if reward is not None]
    mean = statistics.fmean(rewards) if rewards else None
    return EvalMean(label, mean, len(rewards), len(found))


def _slope(points: deque[tuple[float, int]]) -> float:
    """Tokens per second between the oldest and the newest point; 0 while there is only one."""
    (began_s, first), (now_s, last) = points[0], points[-1]
    return max(0, last - first) / (now_s - began_s) if now_s > began_s else 0.0


def _eta_s(step_times_ms: list[int], steps_to_go: int) -> float | None:
    """Seconds to the last step at the recent pace; None before two steps."""
    times = step_times_ms[-_PACE_STEPS - 1 :]
    if len(times) < 2 or steps_to_go <= 0:
        return None
    gaps = [later - earlier for earlier, later in pairwise(times)]
    return statistics.median(gaps) / 1000 * steps_to_go


def _stream_ms(entry_id: str) -> int:
    return int(entry_id.split("-")[0])
