"""C3PO selection: exactly Phi tokens, only the last trajectory cut, nothing lost."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.algorithms.selection import Candidate, Selected, Selection, select


def group(name: str, *lengths: int) -> list[Candidate]:
    return [Candidate(f"{name}.{i}", name, tokens) for i, tokens in enumerate(lengths)]


def ids(selection: Selection) -> list[str]:
    return [one.rollout_id for one in selection.order]


pools = st.tuples(
    st.lists(st.integers(0, 30), max_size=5),
    st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=4), max_size=6),
    st.integers(1, 200),
    st.integers(0, 2**31),
)
Pool = tuple[list[int], list[list[int]], int, int]


def build(pool: Pool) -> tuple[list[Candidate], list[list[Candidate]], int, int]:
    carried, groups, budget, seed = pool
    return group("c", *carried), [group(f"g{i}", *g) for i, g in enumerate(groups)], budget, seed


def test_by_hand() -> None:
    carried = group("c", 10, 5)
    selection = select(carried, [group("g", 8, 8, 8)], budget_tokens=25, seed=1)
    assert selection.order[:2] == (Selected("c.0", "c", 10), Selected("c.1", "c", 5))
    assert [one.trained_tokens for one in selection.order] == [10, 5, 8, 2]
    assert [one.masked_tokens for one in selection.order] == [0, 0, 0, 6]
    assert len(selection.surplus) == 1
    assert {*ids(selection), *selection.surplus} == {"c.0", "c.1", "g.0", "g.1", "g.2"}


def test_exact_fit_masks_nothing() -> None:
    selection = select([], [group("g", 4, 4, 4)], budget_tokens=8, seed=0)
    assert selection.masked_tokens == 0
    assert [one.trained_tokens for one in selection.order] == [4, 4]
    assert len(selection.surplus) == 1


def test_groups_stay_together() -> None:
    groups = [group(f"g{i}", 3, 3, 3) for i in range(6)]
    order = ids(select([], groups, budget_tokens=54, seed=5))
    names = [one.partition(".")[0] for one in order]
    assert sum(a != b for a, b in itertools.pairwise(names)) == 5


def test_shuffles_groups_and_members() -> None:
    groups = [group(f"g{i}", 3, 3, 3) for i in range(6)]
    orders = {tuple(ids(select([], groups, budget_tokens=54, seed=seed))) for seed in range(20)}
    assert len(orders) == 20


def test_empty_rollouts_of_a_reached_group_are_settled() -> None:
    selection = select([], [group("g", 4, 0, 0, 4)], budget_tokens=4, seed=0)
    assert selection.masked_tokens == 0
    assert sorted(one.trained_tokens for one in selection.order) == [0, 0, 4]
    assert len(selection.surplus) == 1


def test_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        select([], [], budget_tokens=0, seed=0)
    with pytest.raises(ValueError, match="twice"):
        select(group("g", 3), [group("g", 3)], budget_tokens=5, seed=0)


@given(pools)
def test_sums_to_exactly_the_budget(pool: Pool) -> None:
    carried, groups, budget, seed = build(pool)
    available = sum(one.num_tokens for one in carried) + sum(
        one.num_tokens for members in groups for one in members
    )
    selection = select(carried, groups, budget_tokens=budget, seed=seed)
    assert selection.trained_tokens == min(budget, available)


@given(pools)
def test_masked_is_exactly_the_tail_of_the_one_that_crosses(pool: Pool) -> None:
    carried, groups, budget, seed = build(pool)
    selection = select(carried, groups, budget_tokens=budget, seed=seed)
    lengths = {one.rollout_id: one.num_tokens for one in carried} | {
        one.rollout_id: one.num_tokens for members in groups for one in members
    }
    reached = 0
    for one in selection.order:
        assert one.trained_tokens + one.masked_tokens == lengths[one.rollout_id]
        reached += one.trained_tokens
        if one.masked_tokens:
            assert reached == budget
            assert one.trained_tokens > 0
    assert sum(one.masked_tokens > 0 for one in selection.order) <= 1


@given(pools)
def test_nothing_is_lost_and_carried_come_first_in_order(pool: Pool) -> None:
    carried, groups, budget, seed = build(pool)
    selection = select(carried, groups, budget_tokens=budget, seed=seed)
    everyone = [one.rollout_id for one in carried] + [
        one.rollout_id for members in groups for one in members
    ]
    assert sorted([*ids(selection), *selection.surplus]) == sorted(everyone)
    for side in (ids(selection), list(selection.surplus)):
        old = [one for one in side if one.startswith("c.")]
        assert side[: len(old)] == old
        assert old == sorted(old, key=lambda one: int(one[2:]))


@given(pools, st.randoms(use_true_random=False))
def test_arrival_order_does_not_matter(pool: Pool, random: object) -> None:
    carried, groups, budget, seed = build(pool)
    direct = select(carried, groups, budget_tokens=budget, seed=seed)
    shuffled = [list(members) for members in groups]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    for members in shuffled:
        random.shuffle(members)  # type: ignore[attr-defined]
    assert select(carried, shuffled, budget_tokens=budget, seed=seed) == direct


@given(pools)
def test_repeated_batches_train_everything_once(pool: Pool) -> None:
    carried, groups, budget, seed = build(pool)
    every = {one.rollout_id: one for one in carried} | {
        one.rollout_id: one for members in groups for one in members
    }
    seen: list[str] = []
    pending, fresh = carried, groups
    while pending or fresh:
        selection = select(pending, fresh, budget_tokens=budget, seed=seed)
        seen += ids(selection)
        pending, fresh = [every[one] for one in selection.surplus], []
    assert sorted(seen) == sorted(every)
