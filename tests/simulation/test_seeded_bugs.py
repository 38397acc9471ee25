"""Tests of the test: known bugs, put into scripts and roles, are found within some schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import redis

import ringasync.coordinator.pipelined
from learner.journal import Journal
from ringasync.scheduling.admission import Admission, GateSettings, GateView, admit
from tests.broker.kit import altered_scripts
from tests.conftest import RedisServer

from . import wire, world
from .explore import FailedError, run_once, search, simulated_scripts
from .schedule import Schedule

pytestmark = [
    pytest.mark.timeout(600),
    # A role that is killed leaves its files to the collector, as it should.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
SCHEDULES = 60


@pytest.fixture
def server(any_redis: RedisServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(any_redis.url) as client:
        yield client


SCRIPT_BUGS = {
    "append-that-is-made-twice": ("append_many", "if r[LENGTH] ~= start or", "if", "append at "),
    "reap-that-forgets-leases": (
        "reap",
        "became = lose_lease(r, t, 'lost', 'session ' .. sid .. ' died', limit)",
        "became = 'parked'",
        "is not among the leases of",
    ),
    "reserved-group-that-stays-ready": (
        "reserve",
        "call('ZREM', P .. 'ready', gid)\n        count_group",
        "count_group",
        "is reserved, which the ready set denies",
    ),
}


@pytest.mark.parametrize("bug", SCRIPT_BUGS)
def test_a_wrong_script_is_found(server: redis.Redis, bug: str) -> None:
    script, right, wrong, what = SCRIPT_BUGS[bug]

    def alter(name: str, text: bytes) -> bytes:
        if name != script:
            return text
        assert text.count(right.encode()) == 1, f"{script} does not read {right!r} once"
        return text.replace(right.encode(), wrong.encode())

    with altered_scripts(alter):
        must_be_found(server, what)


@contextmanager
def commit_before_journal() -> Iterator[None]:
    """A record is told to Redis before it is in the journal, where it only comes with the next."""
    append = Journal.append
    held: dict[int, Any] = {}

    def late(self: Journal, record: Any) -> Any:
        before = held.pop(id(self), None)
        if before is not None:
            append(self, before)
        held[id(self)] = record
        return self.entries[-1] if self.entries else append(self, held.pop(id(self)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "append", late)
        yield


@contextmanager
def slow_learner() -> Iterator[None]:
    """Only the gate holds the backlog of one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "TORCH_S", 2.0)
        patch.setattr(world, "PROMPTS", 24)
        yield


@contextmanager
def gate_that_forgets_graded_groups() -> Iterator[None]:
    """Only what still generates is counted."""

    def forgetful(view: GateView, settings: GateSettings, mean: float) -> Admission:
        return admit(replace(view, known_tokens=0), settings, mean)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ringasync.coordinator.pipelined, "admit", forgetful)
        with slow_learner():
            yield


@pytest.mark.parametrize(
    ("bug", "what"),
    [
        (commit_before_journal, "is committed and not in the journal"),
        (gate_that_forgets_graded_groups, "fed while"),
    ],
)
def test_a_wrong_role_is_found(server: redis.Redis, bug: Callable[[], Any], what: str) -> None:
    with bug():
        must_be_found(server, what)


def test_what_is_found_is_shrunk_and_says_how_to_run_it_again(server: redis.Redis) -> None:
    with commit_before_journal(), pytest.raises(FailedError) as found:
        search(server, 5, seed=1)
    assert found.value.schedule.faults == ()
    assert "is committed and not in the journal" in str(found.value)
    assert "python -m tests.simulation --replay '{" in str(found.value)


def test_a_slow_learner_behind_the_right_gate_holds(server: redis.Redis) -> None:
    """With nothing forgotten the same run passes, so it is the gate that is found."""
    with slow_learner(), simulated_scripts():
        run_once(server, Schedule("pipelined"))


def must_be_found(server: redis.Redis, what: str) -> None:
    with pytest.raises(FailedError) as found:
        search(server, SCHEDULES, seed=3, shrink=False)
    assert what in str(found.value.cause), str(found.value.cause)
