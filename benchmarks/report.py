"""Results as JSON for programs and as markdown tables for people."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.stats import shown

Cell = str | float


@dataclass(frozen=True, slots=True)
class Table:
    """A titled table; numbers are rounded for reading, the JSON keeps them whole."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""

    def markdown(self) -> str:
        """GitHub markdown; raises ``ValueError`` when a row does not fit the columns."""
        lines = [f"### {self.title}", ""]
        lines.append("| " + " | ".join(self.columns) + " |")
        lines.append("|---|" + "---:|" * (len(self.columns) - 1))
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{self.title}: row {list(row)} has not {len(self.columns)} cells")
            cells = [cell if isinstance(cell, str) else shown(cell) for cell in row]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join([*lines, *(["", self.note] if self.note else []), ""])


@dataclass(frozen=True, slots=True)
class Result:
    """What one benchmark found. ``figures`` are for comparing runs, ``tables`` for reading."""

    name: str
    settings: dict[str, Any]
    figures: dict[str, Any]
    tables: Sequence[Table]
    notes: Sequence[str] = field(default_factory=tuple)


def as_markdown(results: Sequence[Result], where: dict[str, str]) -> str:
    """One page: the machine first, then each benchmark with its settings."""
    parts = [f"# Benchmarks, {where['date']}", ""]
    parts += [f"- {name.replace('_', ' ')}: {value}" for name, value in where.items()]
    for result in results:
        settings = ", ".join(f"{name}={value}" for name, value in result.settings.items())
        parts += ["", f"## {result.name}", "", f"Settings: {settings}", ""]
        parts += [table.markdown() for table in result.tables]
        parts += [f"- {note}" for note in result.notes]
    return "\n".join(parts).rstrip() + "\n"


def write(stem: Path, results: Sequence[Result], where: dict[str, str]) -> list[Path]:
    """Write ``STEM.json`` and ``STEM.md``; returns both paths."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    whole = {"machine": where, "results": [dataclasses.asdict(result) for result in results]}
    # with_suffix would cut a stem with a dot in it
    paths = [stem.with_name(stem.name + ending) for ending in (".json", ".md")]
    paths[0].write_text(json.dumps(whole, indent=1, default=str) + "\n")
    paths[1].write_text(as_markdown(results, where))
    return paths


def finish(results: Sequence[Result], where: dict[str, str], out: Path | None) -> None:
    """Print the tables, and write them when asked to. ``where`` was taken before measuring."""
    print(as_markdown(results, where))
    if out is not None:
        for path in write(out, results, where):
            print(f"wrote {path}")
