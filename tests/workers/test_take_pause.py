"""The pause after empty takes: it doubles to a limit and begins anew when there is a reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ringasync.broker.types import Poll
from workers.intake import TakePause

POLL = Poll(
    alive=True,
    phase="running",
    paused=False,
    latest_version=1,
    pin_version=None,
    bad_versions=(),
    round_id=1,
    round_state="open",
    incarnation=1,
    learner_step=0,
)


class Clock:
    """Stands still unless the test moves it."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def pauses(pause: TakePause, clock: Clock, count: int) -> list[float]:
    """How long each of ``count`` empty takes in turn is followed by nothing, to the 0.01 s."""
    found = []
    for _ in range(count):
        assert pause.is_over(POLL, 1)
        pause.note(0)
        begin_s = clock.now_s
        while not pause.is_over(POLL, 1):
            clock.now_s += 0.01
        found.append(round(clock.now_s - begin_s, 2))
    return found


def test_it_doubles_up_to_its_limit() -> None:
    clock = Clock()
    found = pauses(TakePause(clock), clock, 7)
    assert found == pytest.approx([0.05, 0.1, 0.2, 0.2, 0.2, 0.2, 0.2], abs=0.011)


def test_leases_begin_it_anew() -> None:
    clock = Clock()
    pause = TakePause(clock)
    pauses(pause, clock, 5)
    pause.note(3)
    assert pauses(pause, clock, 2) == pytest.approx([0.05, 0.1], abs=0.011)


@pytest.mark.parametrize(
    ("changes", "version"),
    [
        ({"round_state": "training"}, 1),
        ({"round_id": 2}, 1),
        ({"pin_version": 1}, 1),
        ({"paused": True}, 1),
        ({}, 2),
    ],
)
def test_a_new_situation_ends_it_at_once(changes: dict[str, Any], version: int) -> None:
    clock = Clock()
    pause = TakePause(clock)
    pauses(pause, clock, 5)
    pause.note(0)
    assert not pause.is_over(POLL, 1)
    assert not pause.is_over(replace(POLL, learner_step=5, latest_version=2), 1)
    assert pause.is_over(replace(POLL, **changes), version)
    pause.note(0)
    clock.now_s += 0.06
    assert pause.is_over(replace(POLL, **changes), version)
