"""The last lines of a run: did it learn, what did it cost, do the accounts balance."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SUMMARY_FILE = "summary.json"
REPORT_FILE = "report.html"


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """``summary.json`` of a run, or None while there is none (or half of one)."""
    try:
        data = json.loads((run_dir / SUMMARY_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def summary_lines(summary: Mapping[str, Any], run_dir: Path) -> Iterator[str]:
    """A summary in words; what it does not hold, or holds as null, is left out."""
    summary = {name: value for name, value in summary.items() if value is not None}
    first, last = summary.get("eval_reward_first"), summary.get("eval_reward_last")
    if first is not None and last is not None:
        intervals = summary.get("eval_reward_ci95") or []
        low, high = (_interval(intervals, end) for end in (0, -1))
        yield f"held-out reward   {_reward(first)}{low} -> {_reward(last)}{high}"
    before, after = summary.get("train_reward_first"), summary.get("train_reward_last")
    if before is not None and after is not None:
        yield f"training reward   {_reward(before)} -> {_reward(after)} (first and last tenth)"
    if "steps" in summary:
        versions = summary.get("policy_versions")
        yield f"steps             {summary['steps']}" + (
            f", {versions} policy versions" if versions is not None else ""
        )
    if "tokens_accepted" in summary:
        yield (
            f"tokens            {summary['tokens_accepted']} generated, "
            f"{summary.get('tokens_trained', '?')} trained"
        )
    if "wall_s" in summary:
        yield f"time              {float(summary['wall_s']):.0f} s"
    if "ledger_balanced" in summary:
        balanced = "balanced" if summary["ledger_balanced"] else "OUT OF BALANCE: ringasync audit"
        yield f"ledger            {balanced}"
    if (run_dir / REPORT_FILE).exists():
        yield f"report            {run_dir / REPORT_FILE}"


def _reward(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else str(value)


def _interval(intervals: object, end: int) -> str:
    """The 95 % interval of the first (0) or last (-1) evaluation, as `` [low, high]``."""
    found = intervals[end] if isinstance(intervals, list) and intervals else None
    if not isinstance(found, list) or len(found) != 2:
        return ""
    return f" [{_reward(found[0])}, {_reward(found[1])}]"
