"""Length estimate, data position, and the two trackers of the gate."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringasync.errors import CheckpointError
from ringasync.scheduling.lag import OvertakingTracker, VersionLag
from ringasync.scheduling.length_estimate import LengthEstimate
from ringasync.scheduling.watermark import DataPosition

indices = st.lists(st.integers(0, 60), max_size=80)


# Length estimate


def test_prior_stands_alone_fades_and_goes() -> None:
    estimate = LengthEstimate(100.0, window=4, prior_weight=4)
    assert estimate.mean_tokens == 100.0
    estimate.observe([20, 20])  # half of the window: the prior weighs 2 of 4
    assert estimate.mean_tokens == pytest.approx((40 + 2 * 100) / 4)
    estimate.observe([20, 20])
    assert estimate.mean_tokens == 20.0


def test_only_the_window_counts_so_drift_is_followed() -> None:
    estimate = LengthEstimate(100.0, window=3, prior_weight=1)
    estimate.observe([10] * 50)
    estimate.observe([40, 50, 60])
    assert estimate.mean_tokens == 50.0
    assert estimate.count == 3


@given(st.lists(st.integers(0, 1000), max_size=60), st.integers(1, 20))
def test_mean_lies_between_what_went_into_it(lengths: list[int], window: int) -> None:
    estimate = LengthEstimate(300.0, window=window)
    estimate.observe(lengths)
    kept = [*lengths[-window:], 300]
    assert min(1.0, min(kept)) <= estimate.mean_tokens <= max(kept)


def test_nothing_but_empty_answers_still_leaves_a_token() -> None:
    estimate = LengthEstimate(5.0, window=2)
    estimate.observe([0, 0, 0])
    assert estimate.mean_tokens == 1.0
    with pytest.raises(ValueError, match="-1 tokens"):
        estimate.observe([-1])


# Data position


@given(indices)
def test_position_knows_exactly_what_was_closed(closed: list[int]) -> None:
    position = DataPosition().close(closed)
    assert [i for i in range(70) if position.is_closed(i)] == sorted(set(closed))
    assert position.low not in position.exceptions
    assert DataPosition.from_json(position.to_json()) == position


@given(indices, indices)
def test_closing_in_any_order_or_twice_is_the_same(a: list[int], b: list[int]) -> None:
    once = DataPosition().close([*a, *b])
    assert DataPosition().close(b).close(a).close(a) == once


@given(st.integers(0, 50), indices)
def test_what_is_open_is_fed_again_and_nothing_else_below(
    next_index: int, opened: list[int]
) -> None:
    position = DataPosition.before(next_index, opened)
    again = itertools.takewhile(lambda i: i < next_index, position.to_feed())
    assert list(again) == sorted({i for i in opened if i < next_index})


def test_to_feed_goes_on_without_end_from_a_start() -> None:
    position = DataPosition().close([0, 1, 4])
    assert list(itertools.islice(position.to_feed(), 4)) == [2, 3, 5, 6]
    assert list(itertools.islice(position.to_feed(4), 2)) == [5, 6]


def test_many_exceptions_are_stored_as_runs() -> None:
    position = DataPosition().close(range(1, 10_000))
    assert position.to_json() == '{"low":0,"runs":[[1,9999]]}'


@pytest.mark.parametrize(
    "text", ["", "7", "{}", '{"low":1,"runs":[[0,3]]}', '{"low":-1,"runs":[]}']
)
def test_what_is_no_position_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match="not a data position"):
        DataPosition.from_json(text)


# Overtaking


def test_overtaken_tokens_are_those_since_the_oldest_unfinished() -> None:
    tracker = OvertakingTracker()
    assert tracker.overtaken_tokens(500) == 0
    tracker.admitted(["a"], 100)
    tracker.admitted(["b", "c"], 300)
    assert tracker.overtaken_tokens(500) == 400
    tracker.complete("b")
    assert (tracker.oldest, tracker.overtaken_tokens(500)) == ("a", 400)
    tracker.complete("a")
    assert tracker.overtaken_tokens(500) == 200
    tracker.complete("unknown")
    tracker.clear()
    assert (tracker.oldest, tracker.overtaken_tokens(500)) == (None, 0)


# Version lag


def lag(
    state: VersionLag,
    trained: int,
    latest: int,
    workers: list[int],
    now_s: float = 0.0,
    *,
    pinned: bool = False,
) -> int:
    return state.unloaded_tokens(
        trained_tokens=trained,
        latest_version=latest,
        worker_versions=workers,
        pinned=pinned,
        now_s=now_s,
    )


def test_a_step_counts_until_the_slowest_worker_has_loaded_it() -> None:
    state = VersionLag()
    assert lag(state, 0, 1, [1, 1]) == 0
    assert lag(state, 1000, 1, [1, 1]) == 1000  # trained, not published yet
    assert lag(state, 1000, 2, [2, 1]) == 1000  # published, one worker is behind
    assert lag(state, 1000, 2, [2, 2]) == 0
    assert lag(state, 3000, 4, [2, 3]) == 2000


def test_a_worker_that_cannot_load_does_not_shut_the_gate_for_ever() -> None:
    state = VersionLag(lapse_s=10.0)
    lag(state, 0, 1, [1])
    assert lag(state, 1000, 2, [1], 5.0) == 1000
    assert lag(state, 1000, 2, [1], 14.9) == 1000
    assert lag(state, 1000, 2, [1], 15.1) == 0
    assert lag(state, 2000, 3, [1], 16.0) == 2000  # something moved: counted again


def test_a_pin_keeps_it_counted() -> None:
    state = VersionLag(lapse_s=10.0)
    lag(state, 0, 1, [1])
    assert lag(state, 1000, 2, [1], 0.0, pinned=True) == 1000
    assert lag(state, 1000, 2, [1], 60.0, pinned=True) == 1000


def test_without_workers_or_with_starting_ones_only_publication_counts() -> None:
    state = VersionLag()
    lag(state, 0, 1, [])
    assert lag(state, 1000, 2, []) == 0
    assert lag(state, 1000, 2, [0, 2]) == 0
