"""A worker on a device that it shares with the learner: sleep, swap on waking, deaths."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ringasync.broker.types import DeviceClaim
from tests.conftest import RedisServer

from .world import RunningWorker, World, until


@pytest.fixture
async def world(redis_server: RedisServer, run_name: str, tmp_path: Path) -> AsyncIterator[World]:
    made = await World.make(redis_server.url, run_name, tmp_path)
    yield made
    await made.close()


async def claimed(world: World, *, but: str = "") -> DeviceClaim:
    """Ask for the device until only ``but`` owes it."""
    found: list[DeviceClaim] = []

    async def had() -> bool:
        found.append(await world.broker.take_device(world.learner, 0))
        return all(line.startswith(f"{but} ") for line in found[-1].owed_by)

    await until(had, "the device")
    return found[-1]


async def generating(world: World, worker: RunningWorker, rollout_id: str) -> None:
    """Wait until some of its tokens are in Redis."""

    async def begun() -> bool:
        return await world.length(rollout_id) > 0

    await until(begun, f"tokens of {rollout_id}")
    assert worker.worker.control.is_running


async def test_requests_sleep_through_the_learners_turn_and_wake_under_its_weights(
    world: World,
) -> None:
    folders = {1: await world.publish(1)}
    await world.feed("g", size=4, max_new_tokens=150)
    running = await world.start("w")
    await generating(world, running, "g.0")
    claim = await claimed(world)
    assert running.engine._asleep
    before = {i: len(running.engine._running) for i in range(1)}
    tokens = running.worker.status()["tokens_generated"]
    folders[2] = await world.publish(2)
    await world.heartbeats(5)
    assert running.worker.status()["tokens_generated"] == tokens
    assert running.worker.weights.loaded_number == 1, "nothing is loaded in the learner's turn"
    assert len(running.engine._running) == before[0]
    assert await world.broker.return_device(world.learner, claim.turn)
    await world.wait_state("finished", *(f"g.{i}" for i in range(4)))
    for i in range(4):
        versions = (await world.record(f"g.{i}")).policy_versions.tolist()
        assert sorted(set(versions)) == [1, 2]
        await world.assert_true_logprobs(f"g.{i}", folders)
    assert len(running.engines) == 1
    status = running.worker.status()
    assert (status["device_turn"], status["asleep_turn"]) == (2, 0)
    assert float(status["asleep_s"]) > 0
    await world.assert_balanced()


async def test_without_new_weights_the_same_ones_go_on(world: World) -> None:
    folders = {1: await world.publish(1)}
    await world.feed("g", max_new_tokens=150)
    running = await world.start("w")
    await generating(world, running, "g.0")
    for turn in (1, 3):
        claim = await claimed(world)
        assert claim.turn == turn
        await world.broker.return_device(world.learner, claim.turn)
        await until(lambda: not running.worker.device.is_asleep, "waking")
    await world.wait_state("finished", "g.0", "g.1")
    await world.assert_true_logprobs("g.0", folders)
    assert running.worker.weights.swaps == 0


async def test_who_joins_in_the_learners_turn_starts_no_engine_before_it_ends(
    world: World,
) -> None:
    await world.publish(1)
    claim = await claimed(world)
    running = await world.start("late")
    await until(lambda: running.worker.device.is_asleep, "the report")
    assert (await claimed(world)).turn == claim.turn
    await world.heartbeats(5)
    assert running.engines == []
    await world.broker.return_device(world.learner, claim.turn)
    await until(lambda: running.worker.control.is_running, "an engine")
    await world.feed("g")
    await world.wait_state("finished", "g.0", "g.1")


async def test_an_engine_that_dies_asleep_is_rebuilt_when_the_device_is_back(world: World) -> None:
    await world.publish(1)
    await world.feed("g", max_new_tokens=150)
    running = await world.start("w")
    await generating(world, running, "g.0")
    claim = await claimed(world)
    running.engine.kill()
    await until(lambda: running.worker.control.failed is not None, "the failure")
    await world.heartbeats(5)
    assert len(running.engines) == 1, "no engine is built in the learner's turn"
    await world.broker.return_device(world.learner, claim.turn)
    await world.wait_state("finished", "g.0", "g.1")
    assert len(running.engines) == 2
    await world.assert_balanced()


async def test_a_worker_that_dies_asleep_is_not_waited_for(world: World) -> None:
    await world.publish(1)
    await world.feed("g", max_new_tokens=150)
    dying = await world.start("dying")
    await generating(world, dying, "g.0")
    await claimed(world)
    dying.task.cancel()
    await until(dying.task.done, "its end")
    running = await world.start("w")
    await until(lambda: running.worker.device.is_asleep, "the report")
    await world.broker.release_lock(world.learner)  # the learner died as well
    world.learner = await world.broker.acquire_lock("learner", "successor", 600_000)
    claim = await world.broker.take_device(world.learner, 0)
    assert claim == DeviceClaim(1, ())
    await world.broker.return_device(world.learner, claim.turn)

    async def reaped() -> bool:
        await world.broker.reap(world.coordinator, 3)
        return await world.states("g.0", "g.1") == {"finished"}

    await until(reaped, "the other worker to finish them")
    await world.assert_balanced()


async def test_a_stop_in_the_learners_turn_hands_everything_back(world: World) -> None:
    await world.publish(1)
    await world.feed("g", max_new_tokens=150)
    running = await world.start("w")
    await generating(world, running, "g.0")
    await claimed(world)
    assert "stopped" in await running.stop()
    assert running.worker.is_drained
    assert await world.states("g.0", "g.1") == {"parked"}
    await world.assert_balanced()
