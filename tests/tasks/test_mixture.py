"""Mixing by weight: a pure function of (seed, index), exact shares, each row once an epoch."""

from __future__ import annotations

from collections import Counter
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringasync.tasks.base import Problem, Style
from ringasync.tasks.mixture import BLOCK, Mixture, block_shares


class Numbers:
    """A source whose prompts are its name and the row's number."""

    def __init__(self, name: str, size: int | None = None) -> None:
        self.name, self.size = name, size

    def problem(self, index: int) -> Problem:
        assert self.size is None or 0 <= index < self.size
        return Problem(f"{self.name} {index}", self.name, {}, self.name, index)

    def solution(self, index: int, style: Style) -> str | None:
        return f"{style} {index}"


def prompts(mixture: Mixture, rows: range) -> list[str]:
    return [mixture.problem(index).prompt for index in rows]


weights_of = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)
seeds = st.integers(0, 2**31 - 1)


def endless(weights: list[float], seed: int) -> Mixture:
    return Mixture([Numbers(f"d{i}") for i in range(len(weights))], weights, seed)


@given(weights_of, seeds, st.integers(0, 10**9))
def test_any_row_is_the_same_at_every_call_and_in_any_order(
    weights: list[float], seed: int, start: int
) -> None:
    rows = range(start, start + 20)
    forth = prompts(endless(weights, seed), rows)
    assert prompts(endless(weights, seed), rows[::-1]) == forth[::-1]


@given(weights_of, seeds)
def test_a_source_hands_out_every_row_once(weights: list[float], seed: int) -> None:
    seen: dict[str, list[int]] = {}
    mixture = endless(weights, seed)
    for index in range(2 * BLOCK):
        name, row = mixture.problem(index).prompt.split()
        seen.setdefault(name, []).append(int(row))
    for rows in seen.values():
        assert sorted(rows) == list(range(len(rows)))


@given(weights_of)
def test_shares_are_the_weights(weights: list[float]) -> None:
    shares = block_shares(weights)
    assert sum(shares) == BLOCK
    for share, weight in zip(shares, weights, strict=True):
        assert share >= 1
        assert abs(share - weight / sum(weights) * BLOCK) <= len(weights)


def test_order_inside_a_block_is_mixed() -> None:
    mixture = endless([1, 1], 0)
    first = Counter(mixture.problem(index).domain for index in range(BLOCK // 10))
    assert min(first.values()) > BLOCK // 40


def test_seeds_give_other_orders() -> None:
    rows = range(50)
    assert prompts(endless([1, 2], 0), rows) != prompts(endless([1, 2], 1), rows)


def test_problem_carries_the_mixtures_index() -> None:
    assert endless([1, 1], 3).problem(1234).index == 1234


@given(st.integers(1, 30), st.integers(1, 3), seeds)
def test_finite_data_pass_every_row_once_an_epoch_and_end(
    size: int, epochs: int, seed: int
) -> None:
    mixture = Mixture([Numbers("file", size)], [1.0], seed, epochs)
    passes = [prompts(mixture, range(e * size, (e + 1) * size)) for e in range(epochs)]
    every = {f"file {row}" for row in range(size)}
    assert [set(each) for each in passes] == [every] * epochs
    with pytest.raises(IndexError):
        mixture.problem(size * epochs)


def test_epochs_have_their_own_order() -> None:
    mixture = Mixture([Numbers("file", 40)], [1.0], 0)
    assert prompts(mixture, range(40)) != prompts(mixture, range(40, 80))


def test_without_epochs_finite_data_repeat() -> None:
    mixture = Mixture([Numbers("file", 3), Numbers("endless")], [1, 1], 0)
    seen = Counter(mixture.problem(index).prompt for index in range(BLOCK))
    files = [number for prompt, number in seen.items() if prompt.startswith("file")]
    assert len(files) == 3
    assert max(files) - min(files) <= 1


def test_the_first_finite_source_to_run_out_ends_the_mixture() -> None:
    mixture = Mixture([Numbers("short", 10), Numbers("endless")], [1, 1], 0, epochs=1)
    fed = []
    for index in count():
        try:
            fed.append(mixture.problem(index).domain)
        except IndexError:
            break
    assert fed.count("short") == 10


def test_solutions_belong_to_the_problem_at_the_same_index() -> None:
    mixture = endless([1, 3], 5)
    for index in range(30):
        row = mixture.problem(index).prompt.split()[1]
        assert mixture.solution(index, "short") == f"short {row}"


@pytest.mark.parametrize("index", [-1, -1000])
def test_negative_index_is_no_row(index: int) -> None:
    with pytest.raises(IndexError):
        endless([1], 0).problem(index)


def test_mixture_needs_a_weight_a_source() -> None:
    with pytest.raises(ValueError, match="as many weights"):
        Mixture([Numbers("a")], [1, 2], 0)
