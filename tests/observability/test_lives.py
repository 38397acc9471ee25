"""A rollout's transitions become spans that fill its life."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from ringasync.broker.types import RolloutLife
from ringasync.observability.lives import (
    HISTORY_KEPT,
    LifeSpan,
    is_traced,
    life_spans,
    span_id,
    trace_id,
)

GROUP = {"fed_ms": "1000", "size": "2", "domain": "sums", "state": "trained", "ended_ms": "1900"}


def event(t_ms: int, what: str, **fields: Any) -> dict[str, Any]:
    return {"t_ms": t_ms, "event": what, **fields}


def leased(t_ms: int, worker: str, tokens: int = 0) -> dict[str, Any]:
    return event(t_ms, "leased", worker=worker, version=3, tokens=tokens)


TO_VERDICT = (
    leased(1100, "w1"),
    event(1200, "lost", worker="w1", tokens=8, versions="3-3", why="session w1 died"),
    leased(1300, "w2", 8),
    event(1400, "finished", worker="w2", tokens=4, versions="3-4", why="stop"),
    event(1500, "graded", worker="g1", reward=0.5),
)
TAKEN = event(1600, "taken", why="b7")


def spans_of(*history: dict[str, Any], state: str = "taken", **group: str) -> list[LifeSpan]:
    fields = {"group": "g1", "state": state, "tokens": "12", "reward": "0.5"}
    return life_spans(RolloutLife("g1.0", fields, history), {**GROUP, **group})


def shape(spans: list[LifeSpan]) -> list[tuple[str, str, int, int]]:
    return [(span.name, span.who, span.begin_ms, span.end_ms) for span in spans]


def test_a_life_from_feeding_to_training_over_two_workers() -> None:
    spans = spans_of(*TO_VERDICT, TAKEN)
    assert shape(spans) == [
        ("rollout", "", 1000, 1900),
        ("queued", "", 1000, 1100),
        ("generate", "w1", 1100, 1200),
        ("queued", "", 1200, 1300),
        ("generate", "w2", 1300, 1400),
        ("grade", "g1", 1400, 1500),
        ("wait for batch", "", 1500, 1600),
        ("train", "", 1600, 1900),
    ]
    root, _, lost, _, resumed, grade, _, train = spans
    assert [span.error for span in spans if span.error] == ["session w1 died"] == [lost.error]
    assert lost.attributes["tokens"] == 8
    assert resumed.attributes == {
        "policy_version": 3, "resumed_tokens": 8, "outcome": "finished",
        "tokens": 4, "versions": "3-4", "why": "stop",
    }  # fmt: skip
    assert grade.attributes["reward"] == 0.5
    assert train.attributes["batch"] == "b7"
    assert root.attributes["end"] == "trained"
    assert root.attributes["tokens"] == 12


@pytest.mark.parametrize(
    ("end", "error"), [("filtered", ""), ("grade_error", "the verifier hung"), ("lost", "lost")]
)
def test_a_life_that_ends_otherwise_has_no_part_after_its_end(end: str, error: str) -> None:
    reason = error if error != "lost" else ""
    spans = spans_of(*TO_VERDICT, event(1700, end, why=reason), state=end, reason=reason)
    assert shape(spans)[-1] == ("wait for batch", "", 1500, 1700)
    assert (spans[0].end_ms, spans[0].attributes["end"], spans[0].error) == (1700, end, error)


def test_a_verdict_that_failed_is_an_attempt_of_its_own() -> None:
    failed = event(1450, "grading_failed", worker="g1", why="timeout")
    spans = spans_of(*TO_VERDICT[2:4], failed, TO_VERDICT[4], TAKEN)
    grades = [span for span in spans if span.name == "grade"]
    assert [(span.begin_ms, span.end_ms, span.error) for span in grades] == [
        (1400, 1450, "timeout"),
        (1450, 1500, ""),
    ]


def test_where_the_beginning_is_gone_or_not_known_the_first_transition_is_it() -> None:
    long = [leased(1100 + i, "w") for i in range(HISTORY_KEPT)]
    assert spans_of(*long)[0].begin_ms == 1100
    sibling = RolloutLife("g1.2", {"state": "taken"}, (*TO_VERDICT, TAKEN))  # it replaced another
    assert life_spans(sibling, GROUP)[0].begin_ms == 1100
    parts = life_spans(sibling, GROUP)[1:]
    assert all(one.end_ms == other.begin_ms for one, other in pairwise(parts))


def test_ids_depend_on_run_and_rollout_alone() -> None:
    trace = trace_id("demo", "17", "g1.0")
    assert trace == trace_id("demo", "17", "g1.0") < 1 << 128
    others = {trace_id("demo", "18", "g1.0"), trace_id("dem", "o17", "g1.0"),
              trace_id("demo", "17", "g1.1")}  # fmt: skip
    assert len(others | {trace}) == 4
    assert len({span_id(trace, position) for position in range(50)}) == 50


def test_the_share_of_groups() -> None:
    ids = [f"g{index:06d}" for index in range(2000)]
    assert all(is_traced(one, 1.0) for one in ids)
    assert 120 < sum(is_traced(one, 0.1) for one in ids) < 280
    assert {one for one in ids if is_traced(one, 0.1)} < {one for one in ids if is_traced(one, 0.5)}
