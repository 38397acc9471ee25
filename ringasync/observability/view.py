"""The live view in a terminal: ``render`` is pure, ``live_view`` reads and draws."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ringasync.broker.client import Broker
from ringasync.config.schema import Config
from ringasync.observability.plain import duration, human, is_number, plain
from ringasync.observability.record_views import render_audit, render_inspect, render_samples
from ringasync.observability.snapshot import Snapshot, SnapshotReader, fresh_or_last
from ringasync.records.states import Phase

__all__ = ["live_view", "render", "render_audit", "render_inspect", "render_samples"]

REFRESH_S = 0.5
PLAIN_EVERY_S = 10.0
_WIDE = 116
"""Columns from which three panels fit beside each other; two from ``_NARROW``."""
_NARROW = 70
_MOST_ROWS = 24
_FEWEST_ROWS = 3
_ROLES_FRAME_LINES = 3
_SPARK = "▁▂▃▄▅▆▇█"
_SPARK_STEPS = 16
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
            snapshot = await fresh_or_last(reader, snapshot)
            if console.is_terminal:
                live.update(render(snapshot), refresh=True)
            else:
                console.print(render(snapshot))
            if snapshot.phase == Phase.DONE:
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await stop.wait()
            if stop.is_set():
                return


def render(snapshot: Snapshot) -> RenderableType:
    """One snapshot as something rich can print. Text from outside is never read as markup."""
    return _Picture(snapshot)


class _Picture:
    """Fits the terminal: side by side where there is room, and never too high to show the roles."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The parts, top to bottom; the table of roles gets the lines that are left."""
        parts = list(_upper_parts(self._snapshot, options.max_width))
        rows = _MOST_ROWS
        if console.is_terminal:
            used = sum(len(console.render_lines(part, options, pad=False)) for part in parts)
            rows = min(rows, console.height - used - _ROLES_FRAME_LINES)
        yield from parts
        yield _roles(self._snapshot, max(_FEWEST_ROWS, rows), options.max_width)


def _upper_parts(snapshot: Snapshot, width: int) -> Iterator[RenderableType]:
    yield _header(snapshot, width)
    problems = ([snapshot.problem] if snapshot.problem else []) + snapshot.stalls
    if problems:
        body = Text("\n").join(plain(line) for line in problems)
        yield Panel(body, title="stalled", border_style="red")
    if width >= _WIDE:
        spark = _SPARK_STEPS
        yield _beside(
            [_learning(snapshot, spark), _flow(snapshot), _ledger(snapshot)], (47, 43, 30)
        )
        return
    if width >= _NARROW:
        yield _beside([_learning(snapshot, _SPARK_STEPS - 6), _flow(snapshot)], (1, 1))
    else:
        yield _learning(snapshot, 4)
        yield _flow(snapshot)
    yield _ledger_line(snapshot)


def _beside(panels: Sequence[RenderableType], ratios: Sequence[int]) -> RenderableType:
    """Panels of fixed widths, whatever they hold: the picture must not jump."""
    grid = Table.grid(expand=True)
    for ratio in ratios:
        grid.add_column(ratio=ratio)
    grid.add_row(*panels)
    return grid


def _header(snapshot: Snapshot, width: int) -> RenderableType:
    step, total = snapshot.learner_step, snapshot.steps_total
    grid = Table.grid(padding=(0, 2))
    bar = ProgressBar(
        total=max(1, total), completed=min(step, total), width=30 if width >= _WIDE else 16
    )
    grid.add_row(
        Text(snapshot.run, style="bold"),
        plain(snapshot.state),
        Text(f"step {step}/{total}"),
        bar,
        Text("" if snapshot.eta_s is None else f"{duration(snapshot.eta_s)} to go"),
        Text(f"version {snapshot.meta.get('latest_version', '0')}"),
    )
    return grid


def _learning(snapshot: Snapshot, spark_steps: int) -> RenderableType:
    table = _pairs()
    for result in snapshot.evals:
        shown = "no verdict yet" if result.reward is None else f"{result.reward:.3f}"
        _add(table, f"held-out {result.label}", f"{shown} ({result.graded}/{result.seen})")
    rewards = _values(snapshot.steps, "train_reward")
    if rewards:
        recent = statistics.fmean(rewards[-_SMOOTH_STEPS:])
        _add(table, "training reward", f"{recent:.3f} {_sparkline(rewards[-spark_steps:])}")
    last = snapshot.steps[-1] if snapshot.steps else {}
    for name, key, form in (
        ("loss", "loss", "{:.4f}"),
        ("log-prob gap mean", "gap_mean", "{:.2e}"),
        ("IcePop mask rate", "mask_rate", "{:.3%}"),
        ("mean staleness", "staleness_mean", "{:.2f} steps"),
        ("max staleness", "staleness_max", "{:.0f} steps"),
        ("budget fill", "budget_fill", "{:.0%}"),
        ("response length", "response_length_mean", "{:.0f} tokens"),
    ):
        if is_number(last.get(key)):
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
        _add(table, "in steps", f"{human(recent)} tokens/s")
    groups, rollouts = human(backlog.open_groups), human(backlog.open_rollouts)
    _add(table, "open", f"{groups} groups, {rollouts} rollouts")
    _add(table, "generating", f"{human(backlog.running_rollouts)} rollouts")
    _add(table, "waiting", f"{human(backlog.queued_tickets)} tickets")
    _add(table, "grading", f"{human(backlog.grading_jobs)} rollouts")
    if backlog.eval_open:
        _add(table, "held-out open", f"{human(backlog.eval_open)} prompts")
    ready, tokens = human(backlog.ready_groups), human(backlog.ready_tokens)
    _add(table, "ready now", f"{ready} groups, {tokens} tokens")
    for end, count in sorted(snapshot.ends.items()):
        name = "completed" if end == "ready" else f"ended {end}"
        _add(table, name, f"{human(count)} groups")
    return Panel(table, title="queues")


def _ledger(snapshot: Snapshot) -> RenderableType:
    table = _pairs()
    _add(table, "accepted", human(snapshot.ledger.get("accepted", 0)))
    for account, tokens, share in snapshot.accounts():
        _add(table, account, f"{human(tokens)}  {share:.1%}")
    return Panel(table, title="tokens by account")


def _ledger_line(snapshot: Snapshot) -> RenderableType:
    """The same where there is no room for a panel."""
    shares = [f"{account} {share:.1%}" for account, _, share in snapshot.accounts()]
    accepted = human(snapshot.ledger.get("accepted", 0))
    return plain(": ".join([f"tokens {accepted}", *([", ".join(shares)] if shares else [])]))


def _roles(snapshot: Snapshot, rows: int, width: int) -> RenderableType:
    sessions = snapshot.sessions
    is_wide = width >= _WIDE
    padding = (0, 1) if is_wide else (0, 1, 0, 0)
    table = Table(expand=True, box=None, header_style="bold", padding=padding)
    table.add_column("who", no_wrap=True)
    table.add_column(
        "doing", ratio=1, no_wrap=not is_wide, overflow="fold" if is_wide else "ellipsis"
    )
    for heading in ("version", "leases", "tokens/s", "heartbeat"):
        table.add_column(heading, no_wrap=True, justify="right")
    shown = sorted(sessions, key=lambda row: (row.get("state") != "late", row.get("role", "")))
    fits = len(shown) <= rows
    for row in shown if fits else shown[: rows - 1]:
        age_ms = int(row.get("age_ms") or 0)
        late = row.get("state") == "late" or age_ms > _LATE_MS
        table.add_row(
            plain(_name(row)),
            plain(row.get("doing", "")),
            plain(row.get("policy_version", "")),
            plain(row.get("leases", "0")),
            plain(row.get("tokens_per_s", "")),
            Text(f"{age_ms / 1000:.1f} s ago", style="red" if late else ""),
        )
    if not fits:
        table.add_row(Text("..."), Text(f"{len(shown) - rows + 1} more"))
    if not sessions:
        began = snapshot.learner_step or snapshot.ledger.get("accepted")
        hint = "nobody is here" if began else "nobody is here yet: roles take a while to start"
        return Panel(Text(hint), title="who does what")
    return Panel(table, title="who does what")


def _name(row: dict[str, str]) -> str:
    """``worker-1`` says what it is, ``gpu7:3122`` does not."""
    role, name = row.get("role", "?"), row.get("worker") or row.get("id", "?")
    return name if name.startswith(role) else f"{role} {name}"


def _pairs() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(no_wrap=True)
    return table


def _add(table: Table, name: str, value: str) -> None:
    table.add_row(plain(name), plain(value))


def _values(steps: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [float(step[key]) for step in steps if is_number(step.get(key))]


def _sparkline(values: Sequence[float]) -> str:
    low, span = min(values), max(values) - min(values)
    if span <= 0:
        return _SPARK[0] * len(values)
    top = len(_SPARK) - 1
    return "".join(_SPARK[round((value - low) / span * top)] for value in values)
