"""Packing and balancing over ranks: every sequence once, no micro-batch too long, ranks alike."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.algorithms.balance import cost, plan

LENGTHS = st.lists(st.integers(1, 5000), max_size=40)


def test_one_rank_packs_first_fit_longest_first() -> None:
    # 60 | 50, then 40 fits behind the 60, 30 and 20 behind the 50
    assert plan([50, 20, 60, 40, 30], 1, 100) == [[[2, 3], [0, 4, 1]]]


def test_a_sequence_above_the_limit_is_alone() -> None:
    assert plan([300, 10, 20], 1, 100) == [[[0], [2, 1]]]


def test_the_costliest_go_to_the_rank_with_the_least_work() -> None:
    assert plan([70, 50, 50, 30], 2, 100) == [[[0, 3]], [[1, 2]]]
    # By tokens 50 and 45 are more than 90, so 30 goes to the first rank. Where attention costs as
    # much as the matrices at one token already, 90 is 8190, 50 and 45 are 4620 together.
    assert plan([90, 50, 45, 30], 2, 200, even_tokens=10**9) == [[[0, 3]], [[1, 2]]]
    assert plan([90, 50, 45, 30], 2, 200, even_tokens=1) == [[[0]], [[1, 2, 3]]]


def test_ranks_get_equally_many_micro_batches() -> None:
    assert plan([100, 60, 50, 40], 2, 100, even_tokens=1) == [[[0], []], [[1, 3], [2]]]
    # 60, 30 and 11 of the second rank would fit in one; the first has two, so they are parted
    assert plan([100, 60, 30, 11, 5], 2, 101, even_tokens=10**9) == [
        [[0], [4]],
        [[1, 3], [2]],
    ]


def test_nothing_to_plan() -> None:
    assert plan([], 3, 10) == [[], [], []]


@pytest.mark.parametrize("wrong", [([1], 0, 1), ([1], 1, 0), ([0], 1, 1)])
def test_what_cannot_be_is_refused(wrong: tuple[list[int], int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        plan(*wrong)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(1, 8), st.integers(1, 6000))
def test_properties(lengths: list[int], ranks: int, limit: int) -> None:
    found = plan(lengths, ranks, limit)
    assert len(found) == ranks
    assert sorted(i for bins in found for one in bins for i in one) == list(range(len(lengths)))
    assert len({len(bins) for bins in found}) == 1
    for one in (one for bins in found for one in bins):
        assert len(one) < 2 or sum(lengths[index] for index in one) <= limit
    work = [sum(cost(lengths[i]) for one in bins for i in one) for bins in found]
    # LPT: the busiest rank has at most what it had before its last sequence, which was the least
    assert max(work) - min(work) <= max((cost(one) for one in lengths), default=0) + 1e-6
    if ranks == 1 and len(found[0]) > 1:
        full = [sum(lengths[index] for index in one) for one in found[0]]
        assert sum(1 for tokens in full if 2 * tokens <= limit) <= 1, "two would fit in one"
