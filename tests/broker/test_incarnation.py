"""Redis loses its tail: snapshots of all keys are restored, and a server is killed for real."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from ringasync.broker.client import Broker
from ringasync.broker.embedded import EmbeddedRedis
from ringasync.broker.types import Lease, TrainedTokens, VersionInfo
from ringasync.errors import BrokerUnreachableError, SessionLostError
from tests.conftest import RedisServer

from .kit import TTL_MS, Kit, item, new_group
from .snapshot import restore, snapshot


async def test_a_new_incarnation_voids_leases_and_sessions(kit: Kit) -> None:
    await kit.feed("g1", size=5)
    await kit.session("w")
    leases = await kit.broker.take("w", 4, 1)
    await kit.append(leases[0], 0, 4)
    for lease in leases[1:3]:
        await kit.append(lease, 0, 4)
        await kit.finish(lease, 4)
    (job,) = await kit.broker.take_grading("w", 1)
    assert await kit.broker.check_incarnation(kit.coordinator) is None
    number = await kit.broker.begin_incarnation(kit.coordinator, "test")
    assert number > 1
    states = [await kit.state(f"g1.{index}") for index in range(5)]
    assert states == ["parked", "finished", "finished", "queued", "queued"]
    poll = await kit.broker.heartbeat("w", TTL_MS, {})
    assert (poll.alive, poll.incarnation) == (False, number)
    with pytest.raises(SessionLostError):
        await kit.broker.take("w", 1, 1)
    assert await kit.append(leases[0], 4, 1) == "fenced"
    assert await kit.park(leases[3]) == "fenced"
    assert await kit.grade([job], [1.0]) == ["fenced"]
    assert await kit.check() == {"open": 4, "finished": 8}
    await kit.session("w2")
    taken = await kit.broker.take("w2", 9, 1)
    assert sorted(lease.rollout_id for lease in taken) == ["g1.0", "g1.3", "g1.4"]
    assert {lease.token.split(".")[0] for lease in taken} == {str(number)}
    assert {(lease.retention, lease.attempts) for lease in taken} == {(0, 0)}
    assert len(await kit.broker.take_grading("w2", 9)) == 2


async def test_a_change_of_the_servers_run_id_begins_one(kit: Kit) -> None:
    await kit.broker.client.hset(kit.broker.keys.meta, "server_run_id", "another")
    assert (await kit.broker.check_incarnation(kit.coordinator) or 0) > 1
    assert await kit.broker.check_incarnation(kit.coordinator) is None


async def test_after_a_rollback_no_token_comes_twice(kit: Kit) -> None:
    await kit.feed("g1", size=1)
    await kit.session("w")
    before = await snapshot(kit.broker)
    (first,) = await kit.broker.take("w", 1, 1)
    await kit.advance(60_000)
    lost_fence = await kit.broker.acquire_lock("learner", "l2", TTL_MS)
    await restore(kit.broker, before)
    await kit.broker.client.hset(kit.broker.keys.meta, "server_run_id", "before the failover")
    await kit.advance(0)
    new_fence = await kit.broker.acquire_lock("learner", "l3", TTL_MS)
    assert new_fence.token > lost_fence.token
    await kit.broker.begin_incarnation(kit.coordinator, "rollback")
    await kit.session("w2")
    (second,) = await kit.broker.take("w2", 1, 1)
    assert second.token != first.token
    assert await kit.append(first, 0, 3) == "fenced"
    assert await kit.append(second, 0, 3) == "ok"
    assert await kit.check() == {"open": 3}


async def test_what_vanished_is_lost_and_what_was_journalled_is_taken(kit: Kit) -> None:
    """Back are: g1 open with two tokens, g3 not at all; the journal has both."""
    await kit.feed("g1")
    await kit.session("w")
    leases = await kit.broker.take("w", 2, 1)
    await kit.append(leases[0], 0, 2)
    before = await snapshot(kit.broker)
    await kit.append(leases[0], 2, 4)
    await kit.append(leases[1], 0, 6)
    for lease in leases:
        await kit.finish(lease, 6)
    jobs = await kit.broker.take_grading("w", 2)
    await kit.grade(jobs, [0.0, 1.0])
    await kit.ready("g3")
    await kit.broker.reserve(kit.learner, "b1", ["g1", "g3"], 0, 3)
    await kit.broker.commit(kit.learner, "b1", {"g1": 2, "g3": 2})
    await kit.broker.mark_trained(
        kit.learner, "b1", [TrainedTokens("g1", 12, 0, 0), TrainedTokens("g3", 8, 0, 0)], 1
    )
    assert await kit.check() == {"trained": 20}
    await restore(kit.broker, before)
    assert await kit.check() == {"open": 2}
    await kit.broker.begin_incarnation(kit.coordinator, "failover")
    assert await kit.check() == {"open": 2, "lost": 18}
    assert await kit.broker.force_taken(kit.learner, "b1", {"g1": (12, 2), "g3": (8, 2)})
    assert not await kit.broker.force_taken(kit.learner, "b1", {"g1": (12, 2), "g3": (8, 2)})
    assert await kit.check() == {"taken": 20}
    assert await kit.append(leases[0], 2, 1) == "gone"
    await kit.session("w2")
    assert await kit.broker.take("w2", 5, 1) == []
    items = [TrainedTokens("g1", 12, 0, 0), TrainedTokens("g3", 7, 1, 0)]
    assert await kit.broker.mark_trained(kit.learner, "b1", items, 1)
    assert await kit.check() == {"trained": 19, "masked": 1}


@pytest.mark.parametrize("end", ["ready", "reserved", "stale", "leased"])
async def test_a_journalled_group_is_taken_from_any_state(kit: Kit, end: str) -> None:
    if end == "leased":
        await kit.feed("g1")
        await kit.session("w")
        lease = (await kit.broker.take("w", 1, 1))[0]
        await kit.append(lease, 0, 3)
    else:
        await kit.ready("g1", "g2")
    if end == "reserved":
        await kit.broker.reserve(kit.learner, "b7", ["g1", "g2"], 0, 3)
    if end == "stale":
        await kit.broker.end_group(kit.learner, "g1", "stale", "test")
    assert await kit.broker.force_taken(kit.learner, "b1", {"g1": (8, 2)})
    accounts = await kit.check()
    assert accounts["taken"] == 8
    assert await kit.group_state("g1") == "taken"
    if end == "reserved":
        assert await kit.broker.commit(kit.learner, "b7", {"g2": 2})
    await kit.broker.mark_trained(kit.learner, "b1", [TrainedTokens("g1", 8, 0, 0)], 1)
    assert (await kit.check())["trained"] == 8


async def test_an_empty_redis_takes_journalled_groups_and_goes_on(kit: Kit) -> None:
    await kit.broker.delete_run()
    assert await kit.broker.create_run("", "h")
    fresh = await Kit.make(kit.broker)
    assert await kit.broker.force_taken(fresh.learner, "b5", {"g9": (10, 2)})
    assert await kit.check() == {"taken": 10}
    assert await kit.broker.mark_trained(fresh.learner, "b5", [TrainedTokens("g9", 10, 0, 0)], 6)
    assert await kit.check() == {"trained": 10}


async def test_a_killed_server_comes_back_with_its_data_and_a_new_incarnation(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    server = EmbeddedRedis(tmp_path / "redis", 1 << 28, binary=redis_server.binary)
    broker = await Broker.connect(await server.start(), "demo")
    await broker.create_run("", "h")
    fence = await broker.acquire_lock("coordinator", "c1", 60_000)
    learner = await broker.acquire_lock("learner", "l1", 60_000)
    await broker.publish(learner, VersionInfo(1, 0, 0, "{}"))
    await broker.feed(fence, "r1", [new_group("g1")], "cursor")
    await broker.open_session("w", "worker", TTL_MS, {})
    assert len(await broker.take("w", 1, 1)) == 1
    await broker.close()
    await server.stop()
    again = EmbeddedRedis(tmp_path / "redis", 1 << 28, binary=redis_server.binary)
    broker = await Broker.connect(await again.start(), "demo")
    assert await broker.data_cursor() == "cursor"
    await broker.renew_lock(fence, 60_000)
    assert (await broker.check_incarnation(fence) or 0) > 1
    assert not (await broker.heartbeat("w", TTL_MS, {})).alive
    await broker.open_session("w2", "worker", TTL_MS, {})
    assert len(await broker.take("w2", 5, 1)) == 2
    assert (await broker.audit()).balanced
    await broker.close()
    await again.stop()


async def test_a_server_killed_in_the_middle_of_writing_still_balances(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    """SIGKILL while appends stream in: the append-only file may end inside a transaction."""
    incarnation = 1
    for life in range(3):
        server = EmbeddedRedis(tmp_path / "redis", 1 << 28, binary=redis_server.binary)
        broker = await Broker.connect(await server.start(), "demo", retry_budget_s=0.1)
        await broker.create_run("", "h")
        fence = await broker.acquire_lock("coordinator", f"c{life}", 1)
        if life:
            before, incarnation = incarnation, await broker.check_incarnation(fence) or 0
            assert incarnation > before
            assert (await broker.audit()).balanced
        await broker.feed(fence, f"r{life}", [new_group(f"g{life}", 4)], "cursor")
        await broker.open_session("w", "worker", TTL_MS, {})
        leases = await broker.take("w", 99, 1)
        assert len(leases) >= 4
        writing = asyncio.create_task(append_for_ever(broker, leases))
        while (await broker.ledger())["accepted"] < 2000 * (life + 1):
            assert not writing.done(), writing
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(BrokerUnreachableError):
            await writing
        await broker.close()
        await server.stop()
    server = EmbeddedRedis(tmp_path / "redis", 1 << 28, binary=redis_server.binary)
    broker = await Broker.connect(await server.start(), "demo")
    report = await broker.audit()
    assert report.balanced, report
    assert report.accepted_tokens >= 6000
    await broker.close()
    await server.stop()


async def append_for_ever(broker: Broker, leases: list[Lease]) -> None:
    """Append four tokens to every rollout, again and again."""
    start = {lease.rollout_id: lease.num_tokens for lease in leases}
    while True:
        items = [item(lease, start[lease.rollout_id], 4) for lease in leases]
        assert set(await broker.append_many("w", items)) == {"ok"}
        for lease in leases:
            start[lease.rollout_id] += 4


async def test_fencing_tokens_rise_over_two_rollbacks_also_once_the_incarnation_has_begun(
    kit: Kit,
) -> None:
    """Found by simulation: the counter was rolled back, and only a first taker jumped over it."""
    before = await snapshot(kit.broker)
    given = [kit.learner.token]
    for life in range(3):
        await kit.advance(60_000)
        given.append((await kit.broker.acquire_lock("learner", f"l{life}", TTL_MS)).token)
        await restore(kit.broker, before)
        await kit.broker.client.hset(kit.broker.keys.meta, "server_run_id", f"before {life}")
        await kit.broker.begin_incarnation(kit.coordinator, "rollback")
    assert given == sorted(set(given))


async def test_an_incarnation_that_the_tail_held_is_not_begun_again(kit: Kit) -> None:
    before = await snapshot(kit.broker)
    given = []
    for life in range(3):
        await kit.advance(500)  # a server takes longer than a millisecond to come back
        await kit.broker.client.hset(kit.broker.keys.meta, "server_run_id", f"before {life}")
        given.append(await kit.broker.check_incarnation(kit.coordinator) or 0)
        await restore(kit.broker, before)
    assert given == sorted(set(given))
