"""Where a learner's wall time went: read from the ``metrics.jsonl`` of a real run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.machine import machine
from benchmarks.report import Cell, Result, Table, finish
from benchmarks.stats import percentile, shares
from ringasync.coordinator.history import stream_ms
from ringasync.coordinator.metrics_file import METRICS_FILE, read_lines

_TIME = re.compile(r"time_(\w+)_s")
Line = Mapping[str, Any]


def trained_steps(lines: Iterable[Line]) -> list[Line]:
    """The lines of steps in file order, without those a restart trained again from its journal."""
    return [line for line in lines if line.get("kind") == "step" and not line.get("replayed")]


def seconds_by_part(steps: Sequence[Line]) -> dict[str, list[float]]:
    """``{"wait": [...], "train": [...]}``: whatever times the learner writes, a step an element."""
    names = [found[1] for name in steps[0] if (found := _TIME.fullmatch(name))] if steps else []
    return {name: [float(step.get(f"time_{name}_s") or 0) for step in steps] for name in names}


def wall_s(steps: Sequence[Line]) -> float:
    """From the beginning of the first step to the end of the last, by the clock of Redis."""
    first, last = (stream_ms(str(step["id"])) / 1000 for step in (steps[0], steps[-1]))
    return last - first + float(steps[0].get("step_s") or 0)


def measure(run_dir: Path) -> Result:
    """Raises ``ValueError`` when the run has no trained steps."""
    steps = trained_steps(read_lines(run_dir / METRICS_FILE))
    if not steps:
        raise ValueError(f"{run_dir / METRICS_FILE} holds no trained step")
    parts, whole_s = seconds_by_part(steps), wall_s(steps)
    totals = {name: sum(values) for name, values in parts.items()}
    found = shares(totals, whole_s)
    rows: list[list[Cell]] = [
        [
            name,
            found[name],
            totals[name],
            percentile(values, 50),
            percentile(values, 95),
        ]
        for name, values in sorted(parts.items(), key=lambda item: -totals[item[0]])
    ]
    rows.append(["other", found["other"], found["other"] * whole_s, "", ""])
    return Result(
        name=f"Learner ({run_dir.name}, {len(steps)} steps)",
        settings={"run": run_dir.name, "steps": len(steps), "wall_s": round(whole_s, 1)},
        figures={"share_of_wall": found, "wall_s": whole_s, "steps": len(steps)},
        tables=[
            Table(
                "Learner's wall time",
                ["", "share", "seconds", "p50 of a step, s", "p95 of a step, s"],
                rows,
                "Other: starts and restarts, the evaluation at the end, and what no step accounts "
                "for.",
            )
        ],
    )


def newest_run(root: Path = Path("runs")) -> Path | None:
    """The run folder whose metrics were written last."""
    files = sorted(root.glob(f"*/{METRICS_FILE}"), key=lambda path: path.stat().st_mtime)
    return files[-1].parent if files else None


def main(
    run_dir: Annotated[Path | None, typer.Argument(help="Run folder; default: the newest.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write OUT.json and OUT.md.")] = None,
) -> None:
    """Share of the learner's wall time by what it was spent on."""
    run_dir = run_dir or newest_run()
    if run_dir is None:
        raise typer.BadParameter("there is no run under runs/: run `make demo` or name a folder")
    try:
        result = measure(run_dir)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    finish([result], machine(), out)


if __name__ == "__main__":
    typer.run(main)
