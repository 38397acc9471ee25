"""What the learner exports for Prometheus of each step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from learner.step_metrics import StepTimes
from ringasync.observability.exporter import Exporter
from ringasync.observability.families import FAMILIES

STATUS_KEYS = ("step", "steps", "policy_version", "carried")
"""Told by the heartbeat's status, between steps too."""

_GAUGES = [
    family.key
    for family in FAMILIES
    if "learner" in family.roles and family.kind == "gauge" and family.key not in STATUS_KEYS
]
_PARTS = [field.name for field in fields(StepTimes)]


def note_step(exporter: Exporter, metrics: Mapping[str, Any]) -> None:
    """Take a step's metrics into account: gauges show the last step, counters add up all."""
    exporter.set({key: metrics.get(key) for key in _GAUGES})
    seconds = {part.removesuffix("_s"): metrics[f"time_{part}"] for part in _PARTS}
    names = ("replayed", "tokens_trained", "tokens_masked", "grad_norm_spike", "staleness_tokens")
    totals = {name: metrics.get(name) for name in names}
    exporter.add({"steps_done": 1, "seconds": seconds, **totals})
