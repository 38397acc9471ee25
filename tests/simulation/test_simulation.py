"""Schedules of faults over the production roles: nothing is lost, doubled or silently wrong."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.conftest import RedisServer

from . import explore
from .explore import run_once, search, simulated_scripts
from .schedule import Fault, Schedule

pytestmark = [
    pytest.mark.timeout(600),
    # A role that is killed leaves its files to the collector, as it should.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
ROUGH = Schedule(
    "pipelined",
    7,
    (
        Fault(60, "crash_after", 300),
        Fault(140, "cut", 900),
        Fault(220, "crash_before", 40),
        Fault(300, "repeat", 40),
        Fault(380, "jump", 2500),
        Fault(420, "late_answer", 300),
        Fault(460, "crash_after", 5),
    ),
)
LONG = Schedule(
    "rounds",
    9274,
    (
        Fault(79, "cut", 300),
        Fault(129, "crash_after", 900),
        Fault(142, "repeat", 40),
        Fault(210, "hold", 300),
        Fault(220, "repeat", 900),
        Fault(293, "crash_after", 5),
        Fault(329, "cut", 300),
        Fault(388, "hold", 300),
        Fault(493, "crash_after", 40),
        Fault(700, "cut", 40),
        Fault(800, "late_answer", 40),
    ),
)
"""Long enough that what is due by the clock of the machine comes now before, now after a step."""


@pytest.fixture
def server(any_redis: RedisServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(any_redis.url) as client:
        yield client


def test_schedules_hold(server: redis.Redis) -> None:
    search(server, 30, seed=11)


def test_a_schedule_has_the_same_steps_in_every_process(server: redis.Redis) -> None:
    with simulated_scripts():
        steps = run_once(server, ROUGH)
        assert run_once(server, ROUGH) == steps
    assert sum(" FAULT " in step for step in steps) == len(ROUGH.faults)
    again = subprocess.run(
        [sys.executable, "-m", "tests.simulation", "--replay", ROUGH.to_json()],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONHASHSEED": "5"},
    ).stdout
    assert "\n".join(line for line in steps) in again


def test_a_long_schedule_has_the_same_steps_every_time(server: redis.Redis) -> None:
    with simulated_scripts():
        steps = run_once(server, LONG)
        for _ in range(4):
            assert run_once(server, LONG) == steps


def test_a_seed_draws_the_same_schedules_whatever_is_loaded(
    server: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hypothesis draws from the constants of loaded modules too, so a full run of the tests looked
    at other schedules than this file alone."""
    drawn: list[Schedule] = []

    def note(_server: redis.Redis, schedule: Schedule) -> list[str]:
        drawn.append(schedule)
        return []

    monkeypatch.setattr(explore, "run_once", note)
    search(server, 40, seed=3)
    alone = drawn[:]
    drawn.clear()
    (tmp_path / "full_of_constants.py").write_text(f"NUMBERS = {list(range(100, 1000))}\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("full_of_constants")
    search(server, 40, seed=3)
    monkeypatch.delitem(sys.modules, "full_of_constants")
    assert len(alone) == 40
    assert drawn == alone


def test_another_jitter_has_other_steps(server: redis.Redis) -> None:
    with simulated_scripts():
        assert run_once(server, Schedule("rounds", 1)) != run_once(server, Schedule("rounds", 2))
