"""Packing and balancing over ranks: every sequence once, no micro-batch too long, ranks alike."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.algorithms.balance import cost, plan
from learner.backends.collate import MicroBatch, collate
from learner.backends.packing import Attention
from learner.batch import BatchItem

from .kit import batch_of, toy_batch, trajectory

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


def test_padded_rows_are_neighbours_by_length() -> None:
    # 60 alone (two rows of 60 are 120), then 50 + 40 as two rows of 50, then 30 + 20
    assert plan([50, 20, 60, 40, 30], 1, 100, padded=True) == [[[2], [0, 3], [4, 1]]]
    # LPT: 60 | 50, 40 | then 30 to 60, 20 to the other two; each rank pads its own
    assert plan([50, 20, 60, 40, 30], 2, 100, even_tokens=10**9, padded=True) == [
        [[2], [4]],
        [[0, 3], [1]],
    ]


def test_nothing_to_plan() -> None:
    assert plan([], 3, 10) == [[], [], []]


@pytest.mark.parametrize("wrong", [([1], 0, 1), ([1], 1, 0), ([0], 1, 1)])
def test_what_cannot_be_is_refused(wrong: tuple[list[int], int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        plan(*wrong)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(1, 8), st.integers(1, 6000), st.booleans())
def test_properties(lengths: list[int], ranks: int, limit: int, padded: bool) -> None:
    found = plan(lengths, ranks, limit, padded=padded)
    assert len(found) == ranks
    assert sorted(i for bins in found for one in bins for i in one) == list(range(len(lengths)))
    assert len({len(bins) for bins in found}) == 1
    for one in (one for bins in found for one in bins):
        sizes = [lengths[index] for index in one]
        assert len(one) < 2 or (max(sizes) * len(sizes) if padded else sum(sizes)) <= limit
    work = [sum(cost(lengths[i]) for one in bins for i in one) for bins in found]
    # LPT: the busiest rank has at most what it had before its last sequence, which was the least
    assert max(work) - min(work) <= max((cost(one) for one in lengths), default=0) + 1e-6
    if ranks == 1 and len(found[0]) > 1 and not padded:
        full = [sum(lengths[index] for index in one) for one in found[0]]
        assert sum(1 for tokens in full if 2 * tokens <= limit) <= 1, "two would fit in one"


def sequences_of(micros: Sequence[MicroBatch]) -> list[str]:
    return [owner for one in micros if not one.is_filler for owner in one.owners]


def test_micro_batches_are_dealt_out_by_the_plan() -> None:
    # Prompts of 5 and responses of 5, 8, 11, 14, 17, 20 tokens: rows of 10, 13, 16, 19, 22, 25.
    # LPT: 25 | 22 | 19 to 22 | 16 to 25: 41 tokens each, but 22^2 + 19^2 = 845 are less work than
    # 25^2 + 16^2 = 881, so 13 goes there and 10 to the other.
    micros = collate(
        toy_batch(6), microbatch_tokens=50, normalizer="budget", packing="sequences", ranks=2
    )
    ranks = [[[int(o[-1]) for o in one.owners] for one in micros[rank::2]] for rank in range(2)]
    # 25 + 16 + 10 = 51 and 22 + 19 + 13 = 54 are above 50, so each has two.
    assert ranks == [[[5, 2], [0]], [[4, 3], [1]]]
    # One sequence, two ranks: the other runs the same in vain.
    one, other = collate(
        toy_batch(1), microbatch_tokens=50, normalizer="budget", packing="sequences", ranks=2
    )
    assert not one.is_filler
    assert other.is_filler
    assert float(other.inverse_denominators.abs().sum()) == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=12),
    st.integers(1, 5),
    st.integers(1, 200),
    st.sampled_from(["sequences", None]),
)
def test_every_sequence_is_in_one_rank_and_weighs_what_it_did(
    lengths: list[int], ranks: int, limit: int, packing: Attention | None
) -> None:
    items = [
        BatchItem(trajectory(f"g.{index}", length), 1.0, length)
        for index, length in enumerate(lengths)
    ]
    micros = collate(
        batch_of(items),
        microbatch_tokens=limit,
        normalizer="sequence",
        packing=packing,
        ranks=ranks,
    )
    assert sorted(sequences_of(micros)) == sorted(f"g.{index}" for index in range(len(lengths)))
    assert len(micros) % ranks == 0
    (alone,) = collate(
        batch_of(items), microbatch_tokens=10**6, normalizer="sequence", packing="sequences"
    )
    whole = sum(float(one.inverse_denominators.double().sum()) for one in micros)
    assert whole == pytest.approx(float(alone.inverse_denominators.double().sum()), rel=1e-6)
    work = [
        sum(cost(5 + lengths[int(o[2:])]) for o in sequences_of(micros[r::ranks]))
        for r in range(ranks)
    ]
    assert max(work) - min(work) <= max(cost(5 + one) for one in lengths) + 1e-6
