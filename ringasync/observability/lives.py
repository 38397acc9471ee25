"""A rollout's life as spans. Pure: the transitions that Redis keeps are the only source.

They are written by the scripts, on Redis's clock, whoever makes them; so the spans of different
processes join without any of them measuring anything, and what a killed worker did is there too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ringasync.broker.types import RolloutLife

Attributes = dict[str, str | int | float]

ROOT_SPAN = "rollout"
HISTORY_KEPT = 100
"""Transitions that the broker keeps of a rollout; of one with as many the beginning is gone."""

_OPENED_BY = {"finished": "grade", "graded": "wait for batch", "taken": "train"}
_ROLE_OF = {
    "queued": "coordinator",
    "generate": "worker",
    "grade": "grader",
    "wait for batch": "learner",
    "train": "learner",
}
_BACK_TO_GRADING = "grading_"
"""``grading_failed`` and its like: the next attempt begins."""
_BAD_ENDS = frozenset({"quarantined", "grade_error", "lost"})
_FAILURES = frozenset({"lost", "incarnation", "grading_failed", "grading_lost"})
_EVENT_FIELDS = ("tokens", "versions", "reward", "why")
_ROLLOUT_FIELDS = ("kind", "finish", "reward", "versions")
_ROLLOUT_COUNTS = ("tokens", "retention", "attempts", "grade_attempts")


@dataclass(slots=True)
class LifeSpan:
    """One part of a life. ``who``: the session that did it, or empty. ``error``: what went wrong.

    Times are milliseconds since the epoch by Redis's clock.
    """

    name: str
    role: str
    begin_ms: int
    end_ms: int = 0
    who: str = ""
    error: str = ""
    attributes: Attributes = field(default_factory=dict)


def trace_id(run: str, created_ms: str, rollout_id: str) -> int:
    """128 bits from the run's name, ``created_ms`` of its ``meta`` and the rollout's id."""
    return int.from_bytes(_digest(run, created_ms, rollout_id)[:16])


def span_id(trace: int, position: int) -> int:
    """64 bits of the span at ``position`` of a life; 0 is the rollout's own."""
    return int.from_bytes(_digest(str(trace), str(position))[:8])


def is_traced(group_id: str, share: float) -> bool:
    """Whether a group is among the ``share`` that is traced; the same in every process."""
    return int.from_bytes(_digest(group_id)[:4]) < share * (1 << 32)


def life_spans(life: RolloutLife, group: Mapping[str, str]) -> list[LifeSpan]:
    """The whole life first, then its parts in order, one after the other without a gap.

    Of a life whose beginning is not kept any more the first known transition is the beginning.
    """
    history = life.history
    whole_ms = int(group.get("fed_ms") or 0)
    size, index = int(group.get("size") or 0), int(life.id.rpartition(".")[2])
    if not whole_ms or len(history) >= HISTORY_KEPT or index >= size:
        whole_ms = int(history[0]["t_ms"])
    state = life.fields.get("state") or str(history[-1]["event"])
    end_ms, end = int(history[-1]["t_ms"]), state
    if state == "taken":
        end_ms, end = max(end_ms, int(group.get("ended_ms") or 0)), group.get("state") or state
    root = LifeSpan(ROOT_SPAN, "coordinator", whole_ms, end_ms)
    root.attributes = {"rollout": life.id, "group": life.fields.get("group", ""), "end": end}
    root.attributes |= {k: group[k] for k in ("domain",) if group.get(k)}
    root.attributes |= {k: life.fields[k] for k in _ROLLOUT_FIELDS if life.fields.get(k)}
    root.attributes |= {k: int(life.fields[k]) for k in _ROLLOUT_COUNTS if life.fields.get(k)}
    if end in _BAD_ENDS:
        root.error = group.get("reason") or end
    return [root, *_parts(history, whole_ms, end_ms)]


def _parts(history: tuple[dict[str, Any], ...], begin_ms: int, end_ms: int) -> list[LifeSpan]:
    parts: list[LifeSpan] = []
    now = LifeSpan("queued", _ROLE_OF["queued"], begin_ms)
    for event in history:
        what, at_ms = str(event["event"]), int(event["t_ms"])
        _end(now, at_ms, event)
        parts.append(now)
        if what == "leased":
            now = LifeSpan("generate", _ROLE_OF["generate"], at_ms, who=str(event["worker"]))
            now.attributes = {
                "policy_version": int(event["version"]),
                "resumed_tokens": int(event["tokens"]),
            }
        else:
            name = "grade" if what.startswith(_BACK_TO_GRADING) else _OPENED_BY.get(what, "queued")
            now = LifeSpan(name, _ROLE_OF[name], at_ms)
    if now.name == "train":  # all others are over with the last transition
        now.end_ms = end_ms
        now.attributes["batch"] = str(history[-1].get("why", ""))
        parts.append(now)
    return parts


def _end(span: LifeSpan, at_ms: int, event: Mapping[str, Any]) -> None:
    """Close a part with what the transition that ended it says."""
    what = str(event["event"])
    span.end_ms = max(at_ms, span.begin_ms)
    span.attributes["outcome"] = what
    if what == "leased":
        return
    if span.name == "grade":
        span.who = str(event.get("worker", ""))
    span.attributes |= {name: event[name] for name in _EVENT_FIELDS if event.get(name) is not None}
    if what in _FAILURES or what in _BAD_ENDS:
        span.error = str(event.get("why") or what)


def _digest(*parts: str) -> bytes:
    return hashlib.sha256("\0".join(parts).encode()).digest()
