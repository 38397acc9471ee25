"""A group that cannot complete, while everything around it moves, is named in log and `top`."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ringasync.broker.client import Broker
from ringasync.config.schema import Config
from ringasync.coordinator.stuck_groups import may_stand_still, stuck
from tests.coordinator.crew import Crew, until
from tests.coordinator.test_watching import BACKLOG, POLL, coordinating


def member(state: str, **more: str) -> dict[str, str]:
    return {
        **{"state": state, "worker": "w1.a", "length": "8", "attempts": "0"},
        "grade_attempts": "0",
        **more,
    }


@pytest.mark.parametrize(
    ("fields", "debtor"),
    [
        (member("leased"), "worker session w1.a"),
        (member("grading"), "the grader in session w1.a"),
        (member("finished"), "the graders, with 0 jobs"),
        (member("queued"), "nobody: it has no ticket"),
    ],
)
def test_the_debtor_of_a_group_is_named(fields: dict[str, str], debtor: str) -> None:
    found = stuck({"g1": {"g1.0": member("graded"), "g1.1": fields}}, BACKLOG)
    assert debtor in found["g1"].owed_by
    assert f"group g1 to complete: g1.1 ({fields['state']})" in found["g1"].what
    assert "ringasync inspect" in found["g1"].remedy


def test_who_waits_in_a_long_queue_is_not_stuck() -> None:
    queue = dataclasses.replace(BACKLOG, queued_tickets=7)
    assert stuck({"g1": {"g1.0": member("graded"), "g1.1": member("queued")}}, queue) == {}


def test_any_step_of_a_sibling_is_progress() -> None:
    first, second = member("leased"), member("leased", length="9")
    signs = [stuck({"g": {"g.0": one, "g.1": first}}, BACKLOG)["g"].sign for one in (first, second)]
    assert signs[0] != signs[1]


@pytest.mark.parametrize(
    "change", [{"paused": True}, {"device_turn": 3}, {"round_state": "training"}]
)
def test_some_stand_still_for_a_reason(change: dict[str, Any]) -> None:
    assert may_stand_still(dataclasses.replace(POLL, **change))
    assert not may_stand_still(POLL)


async def test_a_rollout_that_nobody_goes_on_with_is_named_while_the_others_move(
    config: Config, redis_url: str, live: Broker
) -> None:
    async with coordinating(config, redis_url):
        crew = Crew(live, config)
        await crew.join()

        async def training_groups() -> bool:
            await crew.turn()
            return (await live.backlog()).queued_tickets > 0

        await until(training_groups, "groups to be fed")
        [held] = await live.take(crew.session, 1, crew.loaded)  # and nothing more is done with it
        group = held.rollout_id.rpartition(".")[0]

        async def named() -> bool:
            if crew.steps_trained < config.learner.steps - 1:
                await crew.turn()
            else:
                await crew.beat()
            rows = await live.sessions()
            shown = "".join(row.get("stall", "") for row in rows if row["role"] == "coordinator")
            return f"group {group} to complete: {held.rollout_id} (leased)" in shown

        await until(named, "the stuck group to be named")
        rows = await live.sessions()
        (stall,) = [row["stall"] for row in rows if row["role"] == "coordinator"]
        assert f"owed by worker session {crew.session}" in stall
