"""Read ``metrics.jsonl`` and ``summary.json`` of a run, whole or cut off, into plain lists."""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
FAILED_ENDS = ("quarantined", "grade_error")
Line = dict[str, Any]


@dataclass(slots=True)
class RunMetrics:
    """What a run has recorded so far.

    ``steps`` are sorted by learner step; of a step that was trained again after a restart the last
    line counts, with ``at_ms`` of the first. ``outcomes`` and ``snapshots`` are in file order.
    ``evals`` maps an evaluation's label to the rewards of its held-out prompts (None: no verdict).
    ``failed`` holds, by group id, the outcomes that ended in one of ``FAILED_ENDS``, also those of
    held-out groups.
    """

    steps: list[Line] = field(default_factory=list)
    outcomes: list[Line] = field(default_factory=list)
    snapshots: list[Line] = field(default_factory=list)
    evals: dict[str, list[float | None]] = field(default_factory=dict)
    eval_lines: dict[str, Line] = field(default_factory=dict)
    events: list[Line] = field(default_factory=list)
    failed: dict[str, Line] = field(default_factory=dict)
    summary: Line = field(default_factory=dict)
    unreadable_lines: int = 0
    step_times_ms: list[int] = field(default_factory=list)

    def step_at(self, at_ms: int) -> int:
        """The learner step that was the newest at a time of Redis's clock; 0 before the first."""
        index = bisect.bisect_right(self.step_times_ms, at_ms) - 1
        return int(self.steps[index]["step"]) if index >= 0 else 0


def read_run(run_dir: Path) -> RunMetrics:
    """Read a run's folder. Missing files and torn lines (a killed recorder) are no error."""
    metrics = RunMetrics(summary=_read_summary(run_dir / SUMMARY_FILE))
    steps: dict[int, Line] = {}
    groups: dict[str, dict[str, float | None]] = {}
    for line in _lines(run_dir / METRICS_FILE, metrics):
        kind = line.get("kind")
        if kind == "outcome" and line.get("end") in FAILED_ENDS:
            metrics.failed[str(line.get("group"))] = line
        if kind == "step" and isinstance(line.get("step"), int):
            steps[line["step"]] = _again(steps.get(line["step"]), line)
        elif kind == "outcome" and line.get("group_kind") == "eval":
            label = str(line.get("group", ""))[1:].rpartition("-")[0]
            groups.setdefault(label, {})[str(line.get("group"))] = _eval_reward(line)
        elif kind == "outcome":
            metrics.outcomes.append(line)
        elif kind == "snapshot":
            metrics.snapshots.append(line)
        elif kind == "eval":
            metrics.eval_lines[str(line.get("label"))] = line
        else:
            metrics.events.append(line)
    metrics.evals = {label: list(found.values()) for label, found in groups.items()}
    metrics.steps = [steps[step] for step in sorted(steps)]
    times = [at_ms_of(line) for line in metrics.steps]
    metrics.step_times_ms = list(accumulate(times, max))
    return metrics


def at_ms_of(line: Line) -> int:
    """When a line's stream entry was made, by Redis's clock; 0 if it came from no stream."""
    if isinstance(line.get("at_ms"), int):
        return int(line["at_ms"])
    head = str(line.get("id", "0")).split("-")[0]
    return int(head) if head.isdigit() else 0


def number(line: Line, key: str) -> float | None:
    """A numeric field, or None when it is absent or something else."""
    value = line.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _again(before: Line | None, line: Line) -> Line:
    """A step's line; of one that was trained again, with the time at which it came first."""
    if before is None:
        return line
    return {**line, "at_ms": min(at_ms_of(before), at_ms_of(line))}


def _eval_reward(line: Line) -> float | None:
    rewards = line.get("rewards")
    return float(rewards[0]) if line.get("end") == "evaluated" and rewards else None


def _lines(path: Path, metrics: RunMetrics) -> Iterator[Line]:
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                metrics.unreadable_lines += 1
                continue
            if isinstance(line, dict):
                yield line


def _read_summary(path: Path) -> Line:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}
