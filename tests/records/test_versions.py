"""Staleness through fork points, against lives worked out by hand."""

from __future__ import annotations

import pytest

from ringasync.records.versions import staleness_steps
from ringasync.scheduling import staleness

STRAIGHT = {1: (0, 0), 2: (1, 0), 3: (2, 0), 4: (5, 0)}

FORKED = {
    1: (0, 0),
    2: (10, 0),
    3: (20, 0),
    4: (25, 0),  # then a crash; the checkpoint is of step 20
    5: (21, 20),
    6: (30, 20),  # then a crash; the checkpoint is of step 15, an older one
    7: (16, 15),
    8: (18, 15),
}


@pytest.mark.parametrize(
    ("version", "now", "expected"),
    [(1, 5, 5), (3, 5, 3), (4, 5, 0), (4, 9, 4), (2, 1, 0)],
)
def test_on_a_straight_line_it_is_the_difference(version: int, now: int, expected: int) -> None:
    assert staleness_steps(version, STRAIGHT, now) == expected


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (1, 18),
        (2, 8),  # below every fork: on the present line
        (3, 5 + 3),  # 5 steps down to the fork at 15, 3 up to 18
        (4, 10 + 3),  # left at 20 already, but the fork at 15 is farther down
        (5, 6 + 3),
        (6, 15 + 3),
        (7, 2),
        (8, 0),
    ],
)
def test_abandoned_lines_go_down_to_the_fork_and_up_again(version: int, expected: int) -> None:
    assert staleness_steps(version, FORKED, 18) == expected


def test_an_unknown_version_counts_as_the_next_older_known_one() -> None:
    steps = {2: (10, 0), 5: (20, 0)}
    assert staleness_steps(3, steps, 21) == staleness_steps(2, steps, 21) == 11
    assert staleness_steps(9, steps, 21) == 1
    assert staleness_steps(1, steps, 21) is None
    assert staleness_steps(1, {}, 21) is None


def test_a_second_life_from_the_same_checkpoint_is_another_line() -> None:
    steps = {1: (0, 0), 2: (22, 20), 3: (24, 20), 4: (21, 20)}
    assert staleness_steps(3, steps, 21) == 4 + 1
    assert staleness_steps(2, steps, 21) == 2 + 1
    assert staleness_steps(1, steps, 21) == 21


def test_scheduling_has_the_same_function() -> None:
    assert staleness.staleness_steps is staleness_steps
