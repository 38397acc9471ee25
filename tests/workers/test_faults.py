"""What goes wrong around a worker: zombies, dead engines, a full Redis, a Redis that restarts."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from ringasync.broker.embedded import EmbeddedRedis
from ringasync.broker.types import Lease
from ringasync.errors import EngineError
from tests.broker.snapshot import restore, snapshot
from workers.engines.base import SamplingParams
from workers.engines.scripted import ScriptedEngine

from .world import TTL_MS, World, until

MakeWorld = Callable[..., Coroutine[Any, Any, World]]


def manual(sampling: SamplingParams) -> ScriptedEngine:
    """An engine that steps only when the test says so."""
    return ScriptedEngine(sampling, step_interval_s=None)


async def test_a_zombie_s_appends_are_refused_and_it_recovers(make_world: MakeWorld) -> None:
    world = await make_world(flush_ms=10_000)  # the second lot of tokens stays in the buffers
    folder = await world.publish(1)
    await world.feed("g1", size=2, max_new_tokens=60)
    zombie = await world.start("zombie", manual)
    await until(lambda: zombie.engines and zombie.engine.active == 2, "the rollouts")
    zombie.engine.step(10)
    await until(lambda: _length_is(world, "g1.0", 10), "the first appends")
    first_session = zombie.worker.session.session_id
    # The session dies while the process stands still; tokens lie in its buffers.
    zombie.engine.step(5)

    async def is_dead() -> bool:  # a heartbeat may come between the two and renew it
        await world.broker.client.zadd(world.broker.keys.sessions, {first_session: 1})
        return (await world.broker.reap(world.coordinator, 5))["parked"] == 2

    await until(is_dead, "the first session's end")
    other = await world.start("other", manual)
    await until(lambda: zombie.worker.session.session_id != first_session, "a new session")
    await until(lambda: other.engines, "the other's engine")
    await until(
        lambda: other.engine.active + zombie.engine.active == 2,
        "the rollouts to be leased again",
    )
    assert [await world.length(f"g1.{i}") for i in range(2)] == [10, 10]
    for running in (zombie, other):
        running.engine.step(50)
    await world.wait_state("finished", "g1.0", "g1.1")
    await world.assert_true_logprobs("g1.0", {1: folder})
    assert await world.length("g1.0") == 60
    await world.assert_balanced()


async def _length_is(world: World, rollout_id: str, length: int) -> bool:
    return await world.length(rollout_id) == length


async def test_appends_under_an_old_lease_are_dropped_without_a_heartbeat(
    make_world: MakeWorld,
) -> None:
    world = await make_world(heartbeat_ms=1600)
    await world.publish(1)
    await world.feed("g1", size=1, max_new_tokens=60)
    running = await world.start("w1", manual)
    await until(lambda: running.engines and running.engine.active == 1, "the rollout")
    await world.broker.client.zadd(
        world.broker.keys.sessions, {running.worker.session.session_id: 1}
    )
    await world.broker.reap(world.coordinator, 5)
    running.engine.step(9)
    await until(lambda: running.engine.active == 0, "the engine to drop it")
    assert await world.length("g1.0") == 0


async def test_a_dead_engine_is_rebuilt_once_and_rollouts_go_on(make_world: MakeWorld) -> None:
    world = await make_world()
    folder = await world.publish(1)
    await world.feed("g1", size=2, max_new_tokens=60)
    running = await world.start("w1", manual)
    await until(lambda: running.engines and running.engine.active == 2, "the rollouts")
    running.engine.step(13)
    running.engine.kill()
    await until(lambda: len(running.engines) == 2 and running.engine.active == 2, "a new engine")
    assert [await world.length(f"g1.{i}") for i in range(2)] == [13, 13]
    running.engine.step(47)
    await world.wait_state("finished", "g1.0", "g1.1")
    await world.assert_true_logprobs("g1.0", {1: folder})
    await world.assert_balanced()


async def test_an_engine_that_dies_again_ends_the_worker_without_leases(
    make_world: MakeWorld,
) -> None:
    world = await make_world()
    await world.publish(1)
    await world.feed("g1", size=2, max_new_tokens=60)
    running = await world.start("w1", manual)
    for count in (1, 2):
        await until(
            lambda n=count: len(running.engines) == n and running.engine.active == 2,  # type: ignore[misc]
            f"engine {count}",
        )
        running.engine.step(5)
        running.engine.kill("a test")
    with pytest.raises(EngineError, match="again"):
        async with asyncio.timeout(10):
            await running.task
    assert EngineError.exit_code == 6
    assert await world.states("g1.0", "g1.1") == {"parked"}
    assert await world.broker.sessions() == []
    await world.assert_balanced()


async def test_a_prompt_that_kills_engines_is_quarantined_in_the_end(
    make_world: MakeWorld,
) -> None:
    """Attempts rise with every engine it kills, so that it cannot kill all workers for ever."""
    world = await make_world()
    await world.publish(1)
    await world.feed("g1", size=1, max_new_tokens=60)
    running = await world.start("w1", manual)
    await until(lambda: running.engines and running.engine.active == 1, "the rollout")
    running.engine.kill("a poison prompt")
    await until(lambda: len(running.engines) == 2, "a new engine")
    assert await world.field("g1.0", "attempts") == "1"


@pytest.fixture
async def own_redis(tmp_path: Path) -> Any:
    """A server of this test's own, which it may fill and restart."""
    server = EmbeddedRedis(tmp_path / "redis", 64 << 20)
    await asyncio.to_thread(server.start_blocking)
    yield server
    await asyncio.to_thread(server.stop_blocking)


async def test_a_full_redis_is_waited_out_with_bounded_tokens(
    own_redis: EmbeddedRedis, make_world: MakeWorld
) -> None:
    world = await make_world(url=own_redis.url, flush_tokens=16)
    folder = await world.publish(1)
    await world.feed("g1", size=4, max_new_tokens=190)
    await world.feed("later", size=2, max_new_tokens=10)
    running = await world.start("w1", max_concurrent=4)
    await until(lambda: int(running.worker.status()["tokens_generated"]) > 40, "tokens")
    await world.broker.client.config_set("maxmemory", 1)
    await until(lambda: running.worker.flusher.full_since_s is not None, "Redis to be full")
    await until(lambda: "unsent tokens" in running.worker.control.held_by, "the engine to be held")
    await until(lambda: "Redis is full" in str(running.worker.status()["doing"]), "no new work")
    assert running.worker.store.most_unsent_tokens() <= 2 * 16
    assert await world.state("later.0") == "queued"
    await world.broker.client.config_set("maxmemory", 0)
    ids = [*(f"g1.{i}" for i in range(4)), "later.0", "later.1"]
    await world.wait_state("finished", *ids)
    for rollout_id in ids:
        await world.assert_true_logprobs(rollout_id, {1: folder})
    assert running.worker.flusher.full_since_s is None
    await running.stop()
    await world.assert_balanced()


async def test_a_drain_while_redis_is_full_ends_in_time(
    own_redis: EmbeddedRedis, make_world: MakeWorld
) -> None:
    world = await make_world(url=own_redis.url, drain_timeout_s=1.0)
    await world.publish(1)
    await world.feed("g1", size=1, max_new_tokens=190)
    running = await world.start("w1", manual)
    await until(lambda: running.engines and running.engine.active == 1, "the rollout")
    await world.broker.client.config_set("maxmemory", 1)
    running.engine.step(9)
    await until(lambda: running.worker.flusher.full_since_s is not None, "Redis to be full")
    assert "not drained in time" in await running.stop()
    assert not running.worker.is_drained
    await world.broker.client.config_set("maxmemory", 0)


async def test_redis_is_killed_and_the_worker_goes_on(
    own_redis: EmbeddedRedis, make_world: MakeWorld
) -> None:
    world = await make_world(url=own_redis.url, flush_tokens=16)
    folder = await world.publish(1)
    await world.feed("g1", size=4, max_new_tokens=190)
    running = await world.start("w1")
    await until(lambda: int(running.worker.status()["tokens_generated"]) > 100, "tokens")
    assert own_redis.pid is not None
    os.kill(own_redis.pid, signal.SIGKILL)
    await until(own_redis.has_ended, "the server's end")
    await until(lambda: "unsent tokens" in running.worker.control.held_by, "the engine to be held")
    assert running.worker.store.most_unsent_tokens() <= 2 * 16
    assert await asyncio.to_thread(own_redis.start_blocking) == world.url
    # The coordinator finds another server process and voids all leases.
    assert (await world.broker.check_incarnation(world.coordinator) or 0) > 1
    ids = [f"g1.{i}" for i in range(4)]
    await world.wait_state("finished", *ids)
    for rollout_id in ids:
        assert await world.length(rollout_id) == 190
        await world.assert_true_logprobs(rollout_id, {1: folder})
    await running.stop()
    await world.assert_balanced()


async def test_redis_that_lost_its_tail_makes_the_worker_resync(make_world: MakeWorld) -> None:
    """A gap: Redis holds less than it had accepted, and nobody has noticed yet."""
    world = await make_world()
    folder = await world.publish(1)
    await world.feed("g1", size=1, max_new_tokens=60)
    running = await world.start("w1", manual)
    await until(lambda: running.engines and running.engine.active == 1, "the rollout")
    running.engine.step(8)
    await until(lambda: _length_is(world, "g1.0", 8), "the first append")
    running.engine.step(8)
    await until(lambda: _length_is(world, "g1.0", 16), "the second append")
    client, keys = world.broker.client, world.broker.keys
    await client.rpop(keys.segments("g1.0"))
    await client.hset(keys.rollout("g1.0"), mapping={"length": 8, "tokens": 8, "progress": 8})
    await client.hincrby(keys.prefix + "ledger", "open", -8)
    await client.hincrby(keys.prefix + "ledger", "lost", 8)
    await client.hincrby(keys.prefix + "pool", "tokens:train:open", -8)
    running.engine.step(8)
    await until(lambda: _resynced(world), "the rollout to be parked")
    await until(lambda: running.engine.active == 1, "it to be taken again")
    running.engine.step(60)
    await world.wait_state("finished", "g1.0")
    assert await world.length("g1.0") == 60
    await world.assert_true_logprobs("g1.0", {1: folder})
    await world.assert_balanced()


async def test_a_rollout_given_up_and_taken_again_in_one_tick_begins_clean(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flusher gives it up while a take is under way, and that take brings it back."""
    world = await make_world(flush_tokens=4)
    folder = await world.publish(1)
    await world.feed("g1", size=1, max_new_tokens=60)
    running = await world.start("w1", manual)
    await until(lambda: running.engines and running.engine.active == 1, "the rollout")
    running.engine.step(8)
    await until(lambda: _length_is(world, "g1.0", 8), "the first append")
    take, keys = running.broker.take, world.broker.keys

    async def take_late(*arguments: Any) -> list[Lease]:
        if await world.length("g1.0") == 8:
            await world.broker.client.delete(keys.segments("g1.0"))
            fields: dict[Any, Any] = {"length": 0, "tokens": 0, "progress": 0}
            await world.broker.client.hset(keys.rollout("g1.0"), mapping=fields)
            await world.broker.client.hincrby(keys.prefix + "ledger", "open", -8)
            await world.broker.client.hincrby(keys.prefix + "ledger", "lost", 8)
            await world.broker.client.hincrby(keys.prefix + "pool", "tokens:train:open", -8)
            running.engine.step(4)
            await until(lambda: "g1.0" not in running.worker.store, "the flusher to give it up")
            await until(lambda: _resynced(world), "the rollout to be parked")
        leases = await take(*arguments)
        if leases:
            running.engine.step(3)  # the old request has not been stopped yet
        return leases

    monkeypatch.setattr(running.broker, "take", take_late)
    await until(lambda: _resynced(world), "the loss")
    await until(lambda: "g1.0" in running.worker.store, "it to be taken again")
    await until(lambda: running.engine.active == 1, "the new request")
    running.engine.step(60)
    await world.wait_state("finished", "g1.0")
    assert await world.length("g1.0") == 60
    await world.assert_true_logprobs("g1.0", {1: folder})
    assert len(running.engines) == 1
    await world.assert_balanced()


async def test_a_rollout_leased_again_while_it_runs_supersedes_the_older_lease(
    make_world: MakeWorld,
) -> None:
    """Redis lost its tail, the lease with it, and hands the rollout out before anybody noticed."""
    world = await make_world(flush_tokens=4)
    folder = await world.publish(1)
    running = await world.start("w1", manual)
    await until(lambda: running.engines, "the engine")
    await world.broker.set_paused(True)
    await world.feed("g1", size=1, max_new_tokens=60)
    queued = await snapshot(world.broker)
    await world.broker.set_paused(False)
    await until(lambda: running.engine.active == 1, "the rollout")
    running.engine.step(8)
    await until(lambda: _length_is(world, "g1.0", 8), "the first append")
    (before,) = running.worker.store
    await restore(world.broker, queued)
    await world.broker.set_paused(False)
    await until(
        lambda: running.task.done() or any(r is not before for r in running.worker.store),
        "the second lease",
    )
    await until(lambda: running.task.done() or running.engine.active == 1, "the new request")
    running.engine.step(60)
    await world.wait_state("finished", "g1.0")
    assert await world.length("g1.0") == 60
    await world.assert_true_logprobs("g1.0", {1: folder})
    assert (len(running.engines), running.task.done()) == (1, False)
    await world.assert_balanced()


async def _resynced(world: World) -> bool:
    history = await world.broker.history("g1.0")
    return any("resync" in str(event.get("why")) for event in history)


async def test_what_a_killed_worker_loses_is_bounded(make_world: MakeWorld) -> None:
    world = await make_world(flush_tokens=8, flush_ms=10_000)
    await world.publish(1)
    await world.feed("g1", size=3, max_new_tokens=150)
    running = await world.start("w1")
    most = 0
    while set(await _states(world)) != {"finished"}:
        for rollout in running.worker.store:
            most = max(most, rollout.unsent_tokens)
        await asyncio.sleep(0.001)
    assert 0 < most <= 2 * 8


async def _states(world: World) -> set[str]:
    return await world.states(*(f"g1.{i}" for i in range(3)))


def test_ttl_is_longer_than_the_tests_heartbeats() -> None:
    """The worlds of these tests may set a heartbeat of up to a third of it."""
    assert TTL_MS >= 3 * 1600
