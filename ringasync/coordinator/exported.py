"""What the coordinator exports for Prometheus, taken from the lines that it records."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ringasync.observability.exporter import Exporter


def note_line(exporter: Exporter, line: dict[str, Any]) -> None:
    """Take a line of ``metrics.jsonl`` into account. Steps are the learner's own to export."""
    match line.get("kind"):
        case "snapshot":
            exporter.set(_snapshot(line))
        case "outcome" if line["group_kind"] == "train" and "rollout" not in line:
            exporter.add({"groups_ended": {line["end"]: 1}})
        case "eval":
            exporter.set({"eval_reward": line["mean"]})


def _snapshot(line: dict[str, Any]) -> dict[str, Any]:
    ledger = dict(line["ledger"])
    accepted = ledger.pop("accepted")
    workers = line["workers"]
    return {
        "learner_step": line["learner_step"],
        "policy_version": line["policy_version"],
        "paused": line["paused"],
        "paused_feeding": bool(line["paused_feeding"]),
        "stall": bool(line["stall"]),
        "sessions": Counter(row["role"] for row in workers),
        "late_sessions": sum(row.get("state") == "late" for row in workers),
        "accepted_tokens": accepted,
        "ledger": ledger,
        "ledger_difference": sum(ledger.values()) - accepted,
        **line["queues"],
    }
