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
    """A summary in words; what it does not hold is left out."""
    first, last = summary.get("eval_reward_first"), summary.get("eval_reward_last")
    if first is not None and last is not None:
        yield f"held-out reward   {_reward(first)} -> {_reward(last)}{_interval(summary)}"
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


def _interval(summary: Mapping[str, Any]) -> str:
    """The 95 % interval, given as a half width or as a pair of bounds for each end of the run."""
    interval = summary.get("eval_reward_ci95")
    if isinstance(interval, int | float):
        return f" (95 % interval +- {interval:.3f})"
    if isinstance(interval, list) and interval:
        bounds = interval[-1] if isinstance(interval[-1], list) else interval
        return f" (95 % interval of the last {_reward(bounds[0])} to {_reward(bounds[-1])})"
    return ""
