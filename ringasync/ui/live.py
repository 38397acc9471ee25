"""What the page shows of a run's present state: a snapshot as rows of text and lines of points."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ringasync.broker.client import Broker
from ringasync.config.schema import Config
from ringasync.observability.plain import duration, human, is_number
from ringasync.observability.snapshot import Snapshot, SnapshotReader, fresh_or_last

FRESH_S = 0.5
"""A snapshot younger than this serves all viewers: a crowd costs Redis no more than one does."""
CHART_STEPS = 200
WIDTH, HEIGHT = 320, 80
Row = tuple[str, str]

_CHARTS = (
    ("training reward", "train_reward", "{:.3f}"),
    ("tokens a second, in steps", "tokens_per_s", "{:,.0f}"),
    ("staleness, mean, steps", "staleness_mean", "{:.2f}"),
    ("IcePop mask rate", "mask_rate", "{:.3%}"),
    ("log-prob gap at age 0, nats", "gap_mean", "{:.2e}"),
    ("gradient norm", "grad_norm", "{:.3g}"),
)
_QUEUES = (
    ("groups open", "open_groups"),
    ("rollouts generating", "running_rollouts"),
    ("tickets waiting", "queued_tickets"),
    ("rollouts to grade", "grading_jobs"),
    ("held-out rollouts open", "eval_open"),
    ("groups ready", "ready_groups"),
    ("tokens ready", "ready_tokens"),
    ("tokens reserved", "reserved_tokens"),
    ("tokens taken", "taken_tokens"),
)


@dataclass(frozen=True, slots=True)
class Chart:
    """One line: ``points`` for an SVG polyline of ``WIDTH`` x ``HEIGHT``, labels for its ends."""

    title: str
    last: str
    low: str
    high: str
    points: str
    span: str
    """Which steps are shown."""


@dataclass(frozen=True, slots=True)
class AccountRow:
    """One ledger account; ``width`` of its bar in percent."""

    name: str
    tokens: str
    width: float


class LiveReader:
    """Snapshots for any number of viewers, read one at a time."""

    def __init__(self, broker: Broker, config: Config) -> None:
        self._reader = SnapshotReader(broker, config)
        self._lock = asyncio.Lock()
        self._last: Snapshot | None = None
        self._read_s = 0.0

    async def snapshot(self) -> Snapshot:
        """The present state; while Redis does not answer the last one, which says so.

        Raises ``BrokerUnreachableError`` when there never was one.
        """
        async with self._lock:
            if self._last is None or time.monotonic() - self._read_s > FRESH_S:
                self._last = await fresh_or_last(self._reader, self._last)
                self._read_s = time.monotonic()
            return self._last


def charts(snapshot: Snapshot) -> Iterator[Chart]:
    """The learner's newest steps, one chart a figure; those without two points are left out."""
    steps = snapshot.steps[-CHART_STEPS:]
    for title, key, form in _CHARTS:
        found = [
            (int(step["step"]), float(step[key])) for step in steps if is_number(step.get(key))
        ]
        if len(found) < 2:
            continue
        values = [value for _, value in found]
        yield Chart(
            title,
            form.format(values[-1]),
            form.format(min(values)),
            form.format(max(values)),
            _polyline(values),
            f"steps {found[0][0]} to {found[-1][0]}",
        )


def headline(snapshot: Snapshot) -> Iterator[Row]:
    """Name and value, most looked for first."""
    yield "phase", snapshot.state
    yield "step", f"{snapshot.learner_step} of {snapshot.steps_total}"
    if snapshot.eta_s is not None:
        yield "to go", duration(snapshot.eta_s)
    yield "policy version", snapshot.meta.get("latest_version", "0")
    yield "generation", f"{human(snapshot.generated_tokens_per_s)} tokens/s"
    for found in snapshot.evals:
        mean = "no verdict yet" if found.reward is None else f"{found.reward:.3f}"
        yield f"held-out reward, {found.label}", f"{mean} ({found.graded} of {found.seen})"


def queues(snapshot: Snapshot) -> Iterator[Row]:
    """The data's way through the run, first to last, and how training groups ended."""
    for name, key in _QUEUES:
        yield name, f"{getattr(snapshot.backlog, key):,}"
    for end, count in sorted(snapshot.ends.items()):
        yield f"groups ended {end}", f"{count:,}"


def accounts(snapshot: Snapshot) -> Iterator[AccountRow]:
    """Every account that holds tokens, with its share of the accepted ones."""
    for name, tokens, share in snapshot.accounts():
        yield AccountRow(name, f"{tokens:,}", round(100 * share, 2))


def balance(snapshot: Snapshot) -> str:
    """Whether the accounts add up to what was accepted."""
    accepted = snapshot.ledger.get("accepted", 0)
    off = sum(snapshot.ledger.values()) - 2 * accepted
    if off:
        return f"OUT OF BALANCE by {off:,} tokens: see `ringasync audit`"
    return f"{accepted:,} accepted tokens, each in one account"


def session_rows(snapshot: Snapshot) -> list[dict[str, Any]]:
    """Who has a session and what it says of itself; late ones first."""
    rows = [
        {
            "name": row.get("worker") or row.get("id", "?"),
            "role": row.get("role", "?"),
            "doing": row.get("doing", ""),
            "version": row.get("policy_version", ""),
            "leases": row.get("leases", "0"),
            "rate": row.get("tokens_per_s", ""),
            "age": f"{int(row.get('age_ms') or 0) / 1000:.1f} s ago",
            "late": row.get("state") == "late",
        }
        for row in snapshot.sessions
    ]
    return sorted(rows, key=lambda row: (not row["late"], row["role"], row["name"]))


def _polyline(values: Sequence[float]) -> str:
    low, span = min(values), max(values) - min(values)
    step = WIDTH / (len(values) - 1)
    heights = ((value - low) / span if span > 0 else 0.5 for value in values)
    return " ".join(
        f"{i * step:.1f},{HEIGHT - 4 - height * (HEIGHT - 8):.1f}"
        for i, height in enumerate(heights)
    )
