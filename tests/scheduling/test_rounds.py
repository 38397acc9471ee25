"""The round machine against Algorithm 1, and Figure 4 of the paper move by move."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringasync.scheduling.rounds import (
    RoundSettings,
    RoundState,
    RoundView,
    groups_to_fill,
    next_action,
    to_purge,
)
from ringasync.scheduling.sim_learner import LearnerSettings
from ringasync.scheduling.sim_world import HeavyTail, WorldSettings
from ringasync.scheduling.simulation import SimResult, simulate_rounds

SETTINGS = RoundSettings(budget_tokens=100, count="trainable", pool_capacity=16, group_size=4)
VIEW = RoundView(
    round_id=3,
    state="open",
    pool=16,
    grading=0,
    waiting_tokens=0,
    completed_tokens=0,
    generated_tokens=0,
)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"state": "none"}, "purge_and_open"),
        ({"pool": 15}, "feed"),
        ({}, "wait"),
        ({"waiting_tokens": 99}, "wait"),
        ({"waiting_tokens": 100}, "close"),
        ({"waiting_tokens": 100, "pool": 0}, "close"),  # full enough before it is refilled
        ({"state": "closing", "grading": 2}, "wait"),
        ({"state": "closing"}, "to_training"),
        ({"state": "training"}, "wait"),
        ({"pool": 15, "data_ended": True}, "wait"),
        ({"pool": 0, "grading": 1, "data_ended": True}, "wait"),
        ({"pool": 0, "data_ended": True}, "close"),
        ({"state": "none", "pool": 0, "data_ended": True}, "end"),
        ({"state": "none", "pool": 0, "data_ended": True, "waiting_tokens": 7}, "purge_and_open"),
    ],
)
def test_moves(change: dict[str, object], kind: str) -> None:
    action = next_action(dataclasses.replace(VIEW, **change), SETTINGS)  # type: ignore[arg-type]
    assert action.kind == kind
    if kind == "purge_and_open":
        assert action.round_id == 4


@pytest.mark.parametrize("count", ["trainable", "completed", "generated"])
def test_each_way_of_counting_looks_at_its_own_sum(
    count: Literal["trainable", "completed", "generated"],
) -> None:
    settings = dataclasses.replace(SETTINGS, count=count)
    sums = {"trainable": "waiting_tokens", "completed": "completed_tokens"}
    field = sums.get(count, "generated_tokens")
    for name in ("waiting_tokens", "completed_tokens", "generated_tokens"):
        view = dataclasses.replace(VIEW, **{name: 100})  # type: ignore[arg-type]
        assert next_action(view, settings).kind == ("close" if name == field else "wait")


@given(st.integers(0, 100), st.integers(1, 60), st.integers(1, 12))
def test_pool_is_full_after_feeding_and_overshoots_by_less_than_a_group(
    pool: int, capacity: int, size: int
) -> None:
    settings = RoundSettings(100, "trainable", capacity, size)
    after = pool + size * groups_to_fill(pool, settings)
    assert after >= min(capacity, after)
    if pool < capacity:
        assert capacity <= after < capacity + size
    else:
        assert after == pool


def test_purge_is_strictly_above_sigma() -> None:
    retention = {"a": 0, "b": 2, "c": 3, "d": 7}
    assert to_purge(retention, 2) == ["c", "d"]
    assert to_purge(retention, 0) == ["b", "c", "d"]
    assert to_purge(retention, None) == []


@given(
    st.sampled_from(["none", "open", "closing", "training"]),
    st.integers(0, 40),
    st.integers(0, 5),
    st.integers(0, 200),
    st.booleans(),
)
def test_the_machine_waits_only_for_somebody(
    state: RoundState, pool: int, grading: int, waiting: int, ended: bool
) -> None:
    view = RoundView(1, state, pool, grading, waiting, 0, 0, ended)
    action = next_action(view, SETTINGS)
    if action.kind == "wait":  # somebody generates, grades or trains
        assert state == "training" or pool > 0 or grading > 0
    if action.kind == "feed":
        assert action.groups >= 1
        assert not ended


class Scripted:
    """Lengths of Figure 4's twelve prompts in ticks; a tick is a token of every rollout.

    Each round lasts five ticks. ``q1``'s first answer ends after one tick, so that q5 is admitted
    into its place; everything else ends in the last tick of a round, or later.
    """

    table: ClassVar[dict[int, Sequence[int]]] = {
        1: (1, 5, 5, 5),
        2: (5, 5, 5, 5),
        3: (10, 15, 15, 15),
        4: (5, 5, 10, 10),
        5: (4, 4, 4, 4),
        6: (5, 5, 5, 5),
        7: (5, 5, 10, 10),
        8: (5, 10, 15, 15),
        9: (10, 10, 10, 10),
        10: (5, 10, 99, 99),
        11: (99, 99, 99, 99),
        12: (5, 99, 99, 99),
    }

    def __call__(self, _rng: np.random.Generator, group_index: int, _size: int) -> Sequence[int]:
        return self.table.get(group_index + 1, (999, 999, 999, 999))


FIGURE_4 = [
    # trained, and what is buffered for the next policy: prompt -> answers done of 4
    ({1, 2, 5}, {3: 0, 4: 2}),
    ({4, 6}, {3: 1, 7: 2, 8: 1}),
    ({3, 7}, {8: 2, 9: 0, 10: 1}),
    ({8, 9}, {10: 2, 11: 0, 12: 1}),
]


@pytest.mark.parametrize(("count", "budget"), [("completed", 60), ("trainable", 50)])
def test_figure_4_of_the_paper(count: Literal["completed", "trainable"], budget: int) -> None:
    result = simulate_rounds(
        WorldSettings(workers=((1.0, 100),), group_size=4, grading_s=0.0, swap_s=0.0),
        LearnerSettings(steps=4, step_s=1.0, cut_to_budget=False, drop_stale=False),
        RoundSettings(budget, count, pool_capacity=16, group_size=4),
        Scripted(),
    )
    seen = [
        (
            {index + 1 for index in record.completed},
            {index + 1: done for index, (done, _) in record.buffer.items()},
        )
        for record in result.rounds[:4]
    ]
    assert seen == FIGURE_4
    assert all(record.trained_tokens > 0 for record in result.rounds[:4])


def heavy(retention_max: int | None, *, seed: int = 3, steps: int = 200) -> SimResult:
    return simulate_rounds(
        WorldSettings(workers=((50.0, 64), (25.0, 64)), failures_per_s=0.01),
        LearnerSettings(steps=steps, step_s=1.0, filtered_share=0.2),
        RoundSettings(6000, "trainable", pool_capacity=128, group_size=8),
        HeavyTail("pareto", 100.0, 1.5, 4000),
        retention_max=retention_max,
        seed=seed,
    )


def test_hundreds_of_rounds_with_heavy_tails_and_failures() -> None:
    result = heavy(None)
    assert not result.stalled
    assert result.steps >= 200
    assert result.max_pool < 128 + 8
    assert result.ends["purged"] == 0
    # Each round trains the budget; what is above it waits for the next.
    assert all(record.trained_tokens >= 6000 for record in result.rounds[:200])


def test_retention_of_what_is_trained_stays_within_sigma_and_purging_is_counted() -> None:
    free, bounded = heavy(None), heavy(2)
    assert free.max_retention > 3
    # A rollout may still finish in the round in which its retention is sigma, not later.
    assert bounded.max_retention <= 2
    assert bounded.ends["purged"] > 0
    generated = sum(bounded.tokens.values())
    assert 0.0 < bounded.tokens["purged"] / generated < 0.5
    # The price that the design names: purging biases lengths short.
    assert np.mean(bounded.trained_lengths) < np.mean(free.trained_lengths)


def test_purging_at_once_never_deadlocks() -> None:
    assert not heavy(0, steps=100).stalled
