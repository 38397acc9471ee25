"""``summary.json``: the run in a few numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ringasync.broker.types import AuditReport
from ringasync.coordinator.evaluation import FIRST, LAST
from ringasync.coordinator.history import RunHistory
from ringasync.coordinator.metrics_file import encode_line

SUMMARY_FILE = "summary.json"


def build_summary(
    run: str,
    history: RunHistory,
    audit: AuditReport,
    *,
    steps: int,
    latest_version: int,
    now_ms: int,
) -> dict[str, Any]:
    """Everything the summary holds; what is not known (no evaluation, no step) is None.

    ``train_reward_first`` and ``_last`` are mean rewards of all complete training groups, filtered
    ones included, sampled during the first and the last tenth of the steps (at least one step).
    """
    first, last = history.evals.get(FIRST), history.evals.get(LAST)
    reward_first, reward_last = train_rewards(history)
    mask_rates = [
        float(row["mask_rate"])
        for row in history.steps.values()
        if row.get("mask_rate") is not None
    ]
    counters = audit.counters
    return {
        "run": run,
        "eval_reward_first": first["mean"] if first else None,
        "eval_reward_last": last["mean"] if last else None,
        "eval_reward_ci95": [line["ci95"] if line else None for line in (first, last)],
        "eval_ci_method": (last or first or {}).get("ci_method"),
        "eval_prompts": [line["n"] if line else 0 for line in (first, last)],
        "train_reward_first": reward_first,
        "train_reward_last": reward_last,
        "steps": steps,
        "tokens_accepted": audit.accepted_tokens,
        "tokens_trained": counters.get("trained", 0),
        "tokens_by_account": dict(counters),
        "ledger_balanced": audit.balanced,
        "ledger_differences": dict(audit.differences),
        "ledger_problems": list(audit.problems[:20]),
        "mask_rate_mean": sum(mask_rates) / len(mask_rates) if mask_rates else None,
        "prompt_tokens": history.prefills.prompt_tokens,
        "prompt_tokens_cached": history.prefills.cached_prompt_tokens,
        "prefilled_per_trained_token": _ratio(
            history.prefills.computed_tokens, counters.get("trained", 0)
        ),
        "policy_versions": max(history.max_version, latest_version),
        "groups_by_end": dict(history.ends),
        "wall_s": round((now_ms - history.first_ms) / 1000, 3),
    }


def train_rewards(history: RunHistory) -> tuple[float | None, float | None]:
    """Mean reward sampled in the first and in the last tenth of the steps."""
    if not history.steps or not history.sampled:
        return None, None
    ends = [history.steps[step]["at_ms"] for step in sorted(history.steps)]
    tenth = max(1, len(ends) // 10)
    first_until = ends[tenth - 1]
    last_from = ends[-tenth - 1] if len(ends) > tenth else 0
    return (
        _mean([reward for at_ms, reward in history.sampled if at_ms <= first_until]),
        _mean([reward for at_ms, reward in history.sampled if last_from < at_ms <= ends[-1]]),
    )


def _ratio(top: int, bottom: int) -> float | None:
    return top / bottom if bottom else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def write_summary(run_dir: Path, summary: Mapping[str, Any]) -> Path:
    """Write ``summary.json``, whole or not at all."""
    path = run_dir / SUMMARY_FILE
    temporary = path.with_suffix(".tmp")
    whole = json.loads(encode_line(dict(summary)))
    temporary.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path
