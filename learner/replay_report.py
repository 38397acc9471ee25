"""Replayed steps beside the recorded ones: lines, verdict, summary, table."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from ringasync.observability.run_metrics import number

RELATIVE_TOLERANCE = 1e-5
ABSOLUTE_TOLERANCE = 1e-7
"""Positive and negative advantages cancel in a loss, whose own size then says little."""
DEVICE_TOLERANCE = 1e-2
"""Relative, for the first step where a GPU had part. Seen: equal there, 5e-3 apart at step 12."""

_Line = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Difference:
    """A step whose loss is not the recorded one; ``rule`` says how near it had to be."""

    step: int
    loss: float
    recorded: float
    rule: str

    def __str__(self) -> str:
        return (
            f"step {self.step}: loss {self.loss!r}, the run had {self.recorded!r} "
            f"(difference {self.loss - self.recorded:+.3g}; {self.rule})"
        )


@dataclass(slots=True)
class Comparison:
    """Replayed steps as they come, against the run's ``recorded`` step lines by step.

    Losses must be equal bit for bit while nothing was changed and every step so far was recorded
    with the same ``arithmetic``, a CPU's; else within the tolerances above. A GPU makes sums in no
    fixed order and its differences grow from step to step, so there only the first step is judged.
    """

    recorded: Mapping[int, _Line]
    arithmetic: str
    lines: list[_Line] = field(default_factory=list)
    first: Difference | None = None
    is_exact: bool = True
    had_device: bool = False

    def add(self, metrics: _Line) -> _Line:
        """Complete a step's metrics to its line: with ``recorded_loss``, ``loss_difference``."""
        before = self.recorded.get(int(metrics["step"]), {})
        same = before.get("arithmetic") == self.arithmetic and self.arithmetic.startswith("cpu")
        self.is_exact &= same
        places = (self.arithmetic, str(before.get("arithmetic", "cpu")))
        self.had_device |= not all(place.startswith("cpu") for place in places)
        loss, was = number(metrics, "loss"), number(before, "loss")
        difference = None if loss is None or was is None else loss - was
        if loss is not None and was is not None and not self._is_near(loss, was):
            self.first = self.first or Difference(int(metrics["step"]), loss, was, self.rule)
        line = {
            "kind": "step",
            "at_ms": time.time_ns() // 1_000_000,
            **metrics,
            "arithmetic": self.arithmetic,
            "recorded_loss": was,
            "loss_difference": difference,
        }
        self.lines.append(line)
        return line

    @property
    def rule(self) -> str:
        """How near a loss must be to the recorded one, in words."""
        if self.is_exact:
            return "must be equal, same arithmetic"
        if self.had_device:
            return (
                f"on a GPU the first step must agree to {DEVICE_TOLERANCE:g}, later ones are shown"
            )
        return f"must agree to {RELATIVE_TOLERANCE:g}: not the same CPU arithmetic throughout"

    def _is_near(self, loss: float, was: float) -> bool:
        if self.is_exact:
            return loss == was
        if self.had_device:
            return bool(self.lines) or math.isclose(loss, was, rel_tol=DEVICE_TOLERANCE)
        return math.isclose(loss, was, rel_tol=RELATIVE_TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE)

    @property
    def compared(self) -> list[_Line]:
        """Steps whose loss the run recorded."""
        return [line for line in self.lines if line["loss_difference"] is not None]

    def summary(self) -> _Line:
        """What the replay found, as plain JSON data."""
        worst = max(self.compared, key=lambda line: abs(line["loss_difference"]), default=None)
        first = self.first
        return {
            "steps": len(self.lines),
            "first_step": self.lines[0]["step"] if self.lines else None,
            "last_step": self.lines[-1]["step"] if self.lines else None,
            "steps_compared": len(self.compared),
            "rule": self.rule,
            "losses_agree": first is None and bool(self.compared),
            "first_differing_step": first.step if first else None,
            "largest_loss_difference": abs(worst["loss_difference"]) if worst else None,
            "largest_loss_difference_step": worst["step"] if worst else None,
            "arithmetic": self.arithmetic,
            **self._means("mask_rate"),
            **self._means("grad_norm"),
            **self._means("gap_mean"),
        }

    def _means(self, key: str) -> dict[str, float | None]:
        """Mean over the steps that the run recorded too, so that both are of the same batches."""
        steps = [line for line in self.lines if line["step"] in self.recorded]
        pairs = [(number(self.recorded[line["step"]], key), number(line, key)) for line in steps]
        whole = [(was, now) for was, now in pairs if was is not None and now is not None]
        means = [sum(column) / len(whole) for column in zip(*whole, strict=True)] or [None, None]
        return {f"{key}_mean_recorded": means[0], f"{key}_mean_replayed": means[1]}


def summary_table(summary: Mapping[str, Any]) -> Table:
    """The summary for a terminal."""
    table = Table(title=f"replay of {summary['run']}: {summary['label']}", title_justify="left")
    for name in ("", "recorded", "replayed"):
        table.add_column(name, justify="left" if not name else "right")
    for key, value in summary["changed"].items():
        table.add_row(key, str(summary["was"][key]), str(value))
    table.add_row("steps", str(summary["steps_compared"]), str(summary["steps"]))
    worst, at = summary["largest_loss_difference"], summary["largest_loss_difference_step"]
    where = f" (step {at})" if worst else ""
    table.add_row("largest |loss difference|", "", f"{_shown(worst)}{where}")
    for key, what in (
        ("mask_rate", "mean mask rate"),
        ("grad_norm", "mean gradient norm"),
        ("gap_mean", "mean log-prob gap, nats"),
    ):
        was, now = summary[f"{key}_mean_recorded"], summary[f"{key}_mean_replayed"]
        table.add_row(what, _shown(was), _shown(now))
    return table


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write readable JSON, whole or not at all."""
    staging = path.with_name(f".{path.name}.new")
    staging.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    staging.replace(path)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
