"""The one consumer of the outcomes and metrics streams: everything lands in ``metrics.jsonl``.

Delivery: each stream entry is in the file exactly once, whatever is killed. The file is the
position: a start goes on after the last id in it, and the streams are trimmed behind it only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from ringasync.broker.types import Outcome
from ringasync.coordinator.history import RunHistory, stream_ms
from ringasync.coordinator.metrics_file import METRICS_FILE, MetricsFile
from ringasync.coordinator.scalars import ScalarWriter, open_writers
from ringasync.coordinator.seat import Seat
from ringasync.observability.log import get_logger
from ringasync.runtime import crashpoints

RECORD_EVERY_S = 0.2
SNAPSHOT_EVERY_S = 2.0
TRIM_EVERY_S = 10.0
KEEP_BEHIND_MS = 600_000
"""Outcomes stay this long after they were recorded: the learner reads them for its checkpoints."""
LAST_LINE_S = 15.0
"""How long the line of the last step is waited for: it may have died with its learner."""
_READ_COUNT = 500
_SESSION_FIELDS = (
    "id", "role", "worker", "state", "doing", "leases", "age_ms", "policy_version",
    "prompt_tokens", "cached_prompt_tokens",
)  # fmt: skip

log = get_logger(__name__)
OutcomeListener = Callable[[Outcome], None]
LineListener = Callable[[dict[str, Any]], None]


class Recorder:
    """Writes lines, keeps ``history`` up to date, tells listeners of outcomes after recording."""

    def __init__(self, seat: Seat, on_line: LineListener | None = None) -> None:
        self._seat, self._on_line = seat, on_line
        self._file = MetricsFile(seat.run_dir / METRICS_FILE)
        self._scalars: list[ScalarWriter] = []
        self._listeners: list[OutcomeListener] = []
        self._reading = asyncio.Lock()
        self._snapshot_s = self._trim_s = 0.0
        self._last_outcome_ms = 0
        self.history = RunHistory()

    def listen(self, listener: OutcomeListener) -> None:
        """Call ``listener`` with each outcome once it is in the file."""
        self._listeners.append(listener)

    def open(self) -> None:
        """Take the file over, learn what it holds, open what else takes the figures.

        Raises:
            EnvironmentRefusedError: the packages of a writer that was asked for are missing.
        """
        for line in self._file.open():
            self.history.add(line)
        self.write({"kind": "start", "at_ms": int(time.time() * 1000)})
        self._scalars = open_writers(self._seat.config, self.history.first_ms)

    def write(self, line: dict[str, Any]) -> None:
        """Record a line that comes from no stream."""
        self._write([line])

    async def run(self) -> None:
        """Record.

        Consumes: the outcomes and metrics streams. Produces: lines, TensorBoard events, snapshots;
        trims outcomes. Waits for: its interval. Ended by: the seat's ``stop``.
        """
        while not self._seat.stop.is_set():
            await self.record()
            await self._snapshot_if_due()
            await self._trim_if_due()
            await self._seat.pause(RECORD_EVERY_S)

    async def record(self) -> None:
        """Record everything that is in the streams now; two callers never read the same entry."""
        async with self._reading:
            while await self._record_outcomes():
                pass
            while await self._record_metrics():
                pass

    async def _record_outcomes(self) -> bool:
        after = self.history.last_ids.get("outcomes", "0")
        outcomes = await self._seat.broker.read_outcomes(after, _READ_COUNT)
        if not outcomes:
            return False
        self._write([outcome_line(outcome) for outcome in outcomes])
        crashpoints.reach("recorded")
        for outcome in outcomes:
            self._last_outcome_ms = stream_ms(outcome.entry_id)
            for listener in self._listeners:
                listener(outcome)
        return len(outcomes) == _READ_COUNT

    async def _record_metrics(self) -> bool:
        after = self.history.last_ids.get("metrics", "0")
        entries = await self._seat.broker.read_metrics(after, _READ_COUNT)
        lines = [metrics_line(entry_id, values) for entry_id, values in entries]
        if lines:
            self._write(lines)
        for line in lines:
            if line["kind"] == "step":
                at_s = stream_ms(line["id"]) / 1000
                self._add("train", line, int(line["step"]), at_s)
        return len(entries) == _READ_COUNT

    def _write(self, lines: list[dict[str, Any]]) -> None:
        self._file.append(lines)
        for line in lines:
            self.history.add(line)
            if self._on_line is not None:
                self._on_line(line)

    async def _snapshot_if_due(self) -> None:
        if time.monotonic() - self._snapshot_s >= SNAPSHOT_EVERY_S:
            self._snapshot_s = time.monotonic()
            await self.snapshot()

    async def snapshot(self) -> None:
        """Record ledger, queue depths and sessions as they are now."""
        broker = self._seat.broker
        backlog, sessions = await broker.backlog(), await broker.sessions()
        queues = {
            name: getattr(backlog, name)
            for name in backlog.__slots__
            if isinstance(getattr(backlog, name), int)
        }
        line = {
            "kind": "snapshot",
            "t_s": round(time.time() - self.history.first_ms / 1000, 3),
            "learner_step": self._seat.poll.learner_step,
            "policy_version": self._seat.poll.latest_version,
            "paused": self._seat.poll.paused,
            "paused_feeding": backlog.paused_feeding,
            "stall": self._seat.status["stall"],
            "ledger": await broker.ledger(),
            "queues": queues,
            "workers": [
                {name: row[name] for name in _SESSION_FIELDS if name in row} for row in sessions
            ],
        }
        self.write(line)
        shown = {"ledger": line["ledger"], "queues": queues}
        self._add("run", shown, self._seat.poll.learner_step, time.time())

    def _add(self, prefix: str, line: dict[str, Any], step: int, at_s: float) -> None:
        for writer in self._scalars:
            writer.add(prefix, line, step, at_s)

    def _sync(self) -> None:
        self._file.sync()
        for writer in self._scalars:
            writer.flush()

    async def _trim_if_due(self) -> None:
        if time.monotonic() - self._trim_s < TRIM_EVERY_S or not self._last_outcome_ms:
            return
        self._trim_s = time.monotonic()
        self._sync()
        before = f"{max(0, self._last_outcome_ms - KEEP_BEHIND_MS)}-0"
        await self._seat.broker.trim_outcomes(self._seat.fence, before)

    async def finish(self, last_step: int = 0) -> None:
        """Record what is left, with a last snapshot, and make the file durable.

        A learner publishes a step before it tells how the step went, so at a run's end the line of
        ``last_step`` may be on its way still; it is waited for.
        """
        ends_s = time.monotonic() + LAST_LINE_S
        await self.record()
        while last_step and last_step not in self.history.steps and time.monotonic() < ends_s:
            await self._seat.fresh_poll()  # the lock must not expire meanwhile
            await asyncio.sleep(RECORD_EVERY_S / 4)
            await self.record()
        await self.snapshot()
        self._sync()

    def close(self) -> None:
        """Close the files."""
        self._file.sync()
        self._file.close()
        for writer in self._scalars:
            writer.close()


def outcome_line(outcome: Outcome) -> dict[str, Any]:
    """How one group ended, as a line."""
    return {
        "kind": "outcome",
        "stream": "outcomes",
        "id": outcome.entry_id,
        "group": outcome.group_id,
        "group_kind": outcome.kind,
        "domain": outcome.domain,
        "end": outcome.end,
        "rewards": list(outcome.rewards),
        "lengths": list(outcome.lengths),
        "versions": list(outcome.versions),
        "retention": outcome.retention,
        "reason": outcome.reason,
        "at_ms": outcome.at_ms,
        **({"rollout": outcome.rollout_id} if outcome.rollout_id else {}),
    }


def metrics_line(entry_id: str, values: dict[str, Any]) -> dict[str, Any]:
    """A metrics entry as a line: the learner's are ``step`` lines, others bear the role's name."""
    role = str(values.get("role", "unknown"))
    kind = values.get("kind", "step" if role == "learner" else role)
    return {**values, "kind": kind, "stream": "metrics", "id": entry_id}
