"""The live view in a terminal: ``render`` is pure, ``live_view`` reads and draws."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ringasync.broker.client import Broker
from ringasync.config.schema import Config
from ringasync.errors import BrokerUnreachableError
from ringasync.observability.plain import duration, human, plain
from ringasync.observability.record_views import render_audit, render_inspect, render_samples
from ringasync.observability.snapshot import Snapshot, SnapshotReader
from ringasync.records.states import Phase

__all__ = ["live_view", "render", "render_audit", "render_inspect", "render_samples"]

REFRESH_S = 0.5
PLAIN_EVERY_S = 10.0
_ROWS = 24
_SPARK = "▁▂▃▄▅▆▇█"
_SPARK_STEPS = 20
_LATE_MS = 3000
_SMOOTH_STEPS = 10


async def live_view(
    broker: Broker, config: Config, stop: asyncio.Event, *, console: Console | None = None
) -> None:
    """Draw the run until ``stop`` or until it is done.

    Consumes: the run's state, metrics and outcomes in Redis. Produces: the picture, twice a second
    (a plain one every 10 s where there is no terminal). Waits for: its interval. Unblocked by:
    ``stop``, the phase ``done``. While Redis does not answer, the last picture stays and says so.
    """
    console = console or Console()
    reader = SnapshotReader(broker, config)
    interval_s = REFRESH_S if console.is_terminal else PLAIN_EVERY_S
    snapshot: Snapshot | None = None
    with Live(console=console, auto_refresh=False) as live:
        while True:
            snapshot = await _read(reader, snapshot)
            if snapshot is not None:
                if console.is_terminal:
                    live.update(render(snapshot), refresh=True)
                else:
                    console.print(render(snapshot))
                if snapshot.phase == Phase.DONE:
                    return
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), interval_s)
            if stop.is_set():
                return


async def _read(reader: SnapshotReader, last: Snapshot | None) -> Snapshot | None:
    try:
        return await reader.read()
    except BrokerUnreachableError as error:
        if last is None:
            raise
        return replace(last, problem=str(error))


def render(snapshot: Snapshot) -> RenderableType:
    """One snapshot as something rich can print. Text from outside is never read as markup."""
    parts: list[RenderableType] = [_header(snapshot)]
    problems = ([snapshot.problem] if snapshot.problem else []) + snapshot.stalls
    if problems:
        body = Text("\n").join(plain(line) for line in problems)
        parts.append(Panel(body, title="stalled", border_style="red"))
    parts.append(Columns([_learning(snapshot), _flow(snapshot), _ledger(snapshot)], padding=(0, 1)))
    parts.append(_roles(snapshot.sessions))
    return Group(*parts)


def _header(snapshot: Snapshot) -> RenderableType:
    step, total = snapshot.learner_step, snapshot.steps_total
    state = snapshot.phase + (" (paused)" if snapshot.meta.get("paused") == "1" else "")
    grid = Table.grid(padding=(0, 2))
    grid.add_row(
        Text(snapshot.run, style="bold"),
        plain(state),
        Text(f"step {step}/{total}"),
        ProgressBar(total=max(1, total), completed=min(step, total), width=30),
        Text("" if snapshot.eta_s is None else f"{duration(snapshot.eta_s)} to go"),
        Text(f"version {snapshot.meta.get('latest_version', '0')}"),
    )
    return grid


def _learning(snapshot: Snapshot) -> RenderableType:
    table = _pairs()
    for result in snapshot.evals:
        shown = "no verdict yet" if result.reward is None else f"{result.reward:.3f}"
        _add(table, f"held-out {result.label}", f"{shown} ({result.graded}/{result.seen})")
    rewards = _values(snapshot.steps, "train_reward")
    if rewards:
        recent = statistics.fmean(rewards[-_SMOOTH_STEPS:])
        _add(table, "training reward", f"{recent:.3f} {_sparkline(rewards)}")
    last = snapshot.steps[-1] if snapshot.steps else {}
    for name, key, form in (
        ("loss", "loss", "{:.4f}"),
        ("log-prob gap mean", "gap_mean", "{:.2e}"),
        ("IcePop mask rate", "mask_rate", "{:.3%}"),
        ("staleness mean", "staleness_mean", "{:.2f} steps"),
        ("staleness max", "staleness_max", "{:.0f} steps"),
        ("budget fill", "budget_fill", "{:.0%}"),
        ("response length", "response_length_mean", "{:.0f} tokens"),
    ):
        if _is_number(last.get(key)):
            _add(table, name, form.format(last[key]))
    if not last:
        _add(table, "steps", "none yet")
    return Panel(table, title="learning")


def _flow(snapshot: Snapshot) -> RenderableType:
    backlog, table = snapshot.backlog, _pairs()
    _add(table, "generation", f"{human(snapshot.generated_tokens_per_s)} tokens/s")
    rates = _values(snapshot.steps, "tokens_per_s")
    if rates:
        recent = statistics.fmean(rates[-_SMOOTH_STEPS:])
        _add(table, "training", f"{human(recent)} tokens/s while stepping")
    for name, value in (
        ("open groups", backlog.open_groups),
        ("open rollouts", backlog.open_rollouts),
        ("generating", backlog.running_rollouts),
        ("waiting tickets", backlog.queued_tickets),
        ("grading", backlog.grading_jobs),
        ("held-out open", backlog.eval_open),
        ("ready groups", backlog.ready_groups),
        ("ready tokens", backlog.ready_tokens),
    ):
        _add(table, name, human(value))
    for end, count in sorted(snapshot.ends.items()):
        _add(table, f"ended {end}", human(count))
    return Panel(table, title="queues")


def _ledger(snapshot: Snapshot) -> RenderableType:
    accepted = max(1, snapshot.ledger.get("accepted", 0))
    table = _pairs()
    _add(table, "accepted", human(snapshot.ledger.get("accepted", 0)))
    for account, tokens in snapshot.ledger.items():
        if account != "accepted" and tokens:
            _add(table, account, f"{human(tokens)}  {tokens / accepted:.1%}")
    return Panel(table, title="tokens by account")


def _roles(sessions: Sequence[dict[str, str]]) -> RenderableType:
    table = Table(expand=True, box=None, header_style="bold")
    for heading in ("role", "who", "doing", "version", "leases", "tokens/s", "heartbeat"):
        table.add_column(heading, overflow="fold")
    shown = sorted(sessions, key=lambda row: (row.get("state") != "late", row.get("role", "")))
    for row in shown[:_ROWS]:
        age_ms = int(row.get("age_ms") or 0)
        late = row.get("state") == "late" or age_ms > _LATE_MS
        table.add_row(
            plain(row.get("role", "?")),
            plain(row.get("worker") or row.get("id", "?")),
            plain(row.get("doing", "")),
            plain(row.get("policy_version", "")),
            plain(row.get("leases", "0")),
            plain(row.get("tokens_per_s", "")),
            Text(f"{age_ms / 1000:.1f} s ago", style="red" if late else ""),
        )
    if len(sessions) > _ROWS:
        table.add_row(Text("..."), Text(f"{len(sessions) - _ROWS} more"))
    if not sessions:
        table.add_row(Text("nobody is here yet"))
    return Panel(table, title="who does what")


def _pairs() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(no_wrap=True)
    return table


def _add(table: Table, name: str, value: str) -> None:
    table.add_row(plain(name), plain(value))


def _values(steps: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [float(step[key]) for step in steps if _is_number(step.get(key))]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _sparkline(values: Sequence[float]) -> str:
    shown = values[-_SPARK_STEPS:]
    low, span = min(shown), max(shown) - min(shown)
    if span <= 0:
        return _SPARK[0] * len(shown)
    top = len(_SPARK) - 1
    return "".join(_SPARK[round((value - low) / span * top)] for value in shown)
