"""Single records for people: a rollout's life, graded answers, the audit. Pure."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ringasync.broker.types import AuditReport
from ringasync.observability.plain import plain, printable

_TEXT_CHARS = 4000
_LAST_REASONS = 5
_SHOWN_FIELDS = (
    "group", "kind", "state", "worker", "tokens", "length", "versions", "retention", "attempts",
    "grade_attempts", "finish", "reward", "reason",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class HistoryRow:
    """One transition of a rollout. ``at_ms`` by Redis's clock, ``after`` since the first one."""

    at_ms: int
    after: str
    event: str
    who: str
    version: str
    tokens: str
    why: str


def history_rows(history: Sequence[Mapping[str, Any]]) -> list[HistoryRow]:
    """A rollout's transitions as text, oldest first."""
    first_ms = int(history[0].get("t_ms", 0)) if history else 0
    return [
        HistoryRow(
            at_ms := int(entry.get("t_ms", 0)),
            f"{(at_ms - first_ms) / 1000:.1f} s",
            str(entry.get("event", "?")),
            str(entry.get("worker", "")),
            str(entry.get("versions") or entry.get("version", "")),
            str(entry.get("tokens", "")),
            str(entry.get("why") or (f"reward {entry['reward']}" if "reward" in entry else "")),
        )
        for entry in history
    ]


def inspect_rows(
    fields: Mapping[str, str], group: Mapping[str, str] | None
) -> Iterator[tuple[str, str]]:
    """Names and values of a rollout's fields and of those of its group that explain it."""
    for name in _SHOWN_FIELDS:
        if fields.get(name):
            yield name, _state(fields, group) if name == "state" else fields[name]
    for name in ("state", "domain", "prompt", "reason"):
        if group and group.get(name):
            yield f"group's {name}", group[name]


def render_inspect(
    rollout_id: str,
    fields: Mapping[str, str] | None,
    history: Sequence[Mapping[str, Any]],
    group: Mapping[str, str] | None = None,
) -> RenderableType:
    """The life of one rollout: its fields, then when, what, who, which version, tokens, why."""
    if not fields and not history:
        return plain(f"nothing is known of {rollout_id}: no such rollout, or gone for an hour")
    parts: list[RenderableType] = [Panel(_fields(fields or {}, group), title=plain(rollout_id))]
    table = Table(expand=True, box=None, header_style="bold")
    for heading in ("when", "after", "event", "who", "version", "tokens", "why"):
        table.add_column(heading, overflow="fold")
    for row in history_rows(history):
        clock = Text(time.strftime("%H:%M:%S", time.localtime(row.at_ms / 1000)))
        shown = (row.after, row.event, row.who, row.version, row.tokens, row.why)
        table.add_row(clock, *(plain(text) for text in shown))
    parts.append(table)
    return Group(*parts)


def render_samples(samples: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Graded answers, one panel each: prompt, answer, reward."""
    if not samples:
        return Text("no answer has been graded yet")
    return Group(*(_sample(sample) for sample in samples))


def render_audit(report: AuditReport) -> RenderableType:
    """The accounts beside what the records say; differences and broken links in red."""
    table = Table(box=None, header_style="bold")
    table.add_column("account")
    for heading in ("counter", "recounted", "difference"):
        table.add_column(heading, justify="right")
    for account, tokens in report.counters.items():
        difference = report.differences.get(account, 0)
        table.add_row(
            plain(account),
            Text(f"{tokens:,}"),
            Text(f"{report.recomputed.get(account, tokens):,}"),
            Text(f"{difference:+,}" if difference else "", style="red"),
        )
    parts: list[RenderableType] = [table]
    parts += [Text.assemble(("problem: ", "red"), plain(line)) for line in report.problems]
    if report.balanced:
        verdict = f"balanced: {report.accepted_tokens:,} accepted tokens, each in one account"
        parts.append(Text(verdict, style="green"))
    else:
        parts.append(Text(f"OUT OF BALANCE: {report.accepted_tokens:,} accepted tokens", "red"))
    return Group(*parts)


def render_failures(failures: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Groups that ended quarantined or grade_error: how many, their tokens, the last reasons.

    ``failures`` are outcomes with ``end``, ``group``, ``lengths`` and ``reason``, oldest first. A
    bad prompt is among them with 0 tokens: the accounts do not show it.
    """
    if not failures:
        return Text("no group ended quarantined or grade_error")
    parts: list[RenderableType] = []
    for end in sorted({str(line.get("end", "?")) for line in failures}):
        rows = [line for line in failures if str(line.get("end", "?")) == end]
        lengths = [n for line in rows for n in line.get("lengths") or () if isinstance(n, int)]
        parts.append(
            plain(f"{len(rows):,} groups ended {end} ({sum(lengths):,} tokens); the last:")
        )
        parts += [
            Text.assemble("  ", plain(line.get("group", "?")), ": ", plain(line.get("reason", "")))
            for line in rows[-_LAST_REASONS:]
        ]
    return Group(*parts)


def _fields(fields: Mapping[str, str], group: Mapping[str, str] | None) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    for name, value in inspect_rows(fields, group):
        grid.add_row(Text(name), plain(value))
    return grid


def _state(fields: Mapping[str, str], group: Mapping[str, str] | None) -> str:
    """A rollout's own state ends at ``taken``, with its payload; the rest is its group's."""
    ended = group is not None and fields["state"] == "taken" and group.get("state") == "trained"
    return "trained" if ended else fields["state"]


def _sample(sample: Mapping[str, Any]) -> RenderableType:
    title = " · ".join(
        str(part)
        for part in (
            sample.get("rollout", "?"),
            sample.get("kind", ""),
            sample.get("domain", ""),
            f"{sample.get('tokens', '?')} tokens",
            f"version {sample.get('versions', '?')}",
            f"reward {sample.get('reward', '?')}",
        )
        if part
    )
    reward = sample.get("reward")
    good = isinstance(reward, int | float) and reward > 0
    body = Text.assemble(
        (printable(str(sample.get("prompt", "")), "\n\t")[:_TEXT_CHARS], "dim"),
        "\n",
        printable(str(sample.get("text", "")), "\n\t")[:_TEXT_CHARS],
    )
    return Panel(body, title=plain(title), border_style="green" if good else "yellow")
