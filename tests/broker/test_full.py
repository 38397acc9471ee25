"""Redis at its memory limit: what drains goes on, what grows is refused whole; every script."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import ringasync.broker
from ringasync.broker.client import Broker
from ringasync.broker.embedded import EmbeddedRedis
from ringasync.broker.types import Lease, TrainedTokens, Verdict, VersionInfo
from tests.conftest import CONFIG_HASH, RedisServer

from .kit import TTL_MS, Kit, item, new_group

Step = Callable[["World"], Awaitable[object]]


class World:
    """A run with something in every state, on a server of its own."""

    def __init__(self, kit: Kit, leases: dict[str, Lease]) -> None:
        self.kit, self.broker, self.leases = kit, kit.broker, leases

    @classmethod
    async def make(cls, broker: Broker) -> World:
        """g1 ready, g2 reserved in b2, g3 taken in b3, g4 leased, finished, grading and queued."""
        kit = await Kit.make(broker)
        await kit.ready("g1")
        await kit.ready("g2")
        await kit.ready("g3")
        await broker.reserve(kit.learner, "b2", ["g2"], 0, 3)
        await broker.reserve(kit.learner, "b3", ["g3"], 0, 3)
        await broker.commit(kit.learner, "b3", {"g3": 2})
        await kit.feed("g4", size=4)
        await kit.session("w")
        await kit.session("v")
        leases = {lease.rollout_id: lease for lease in await broker.take("w", 3, 1)}
        for lease in leases.values():
            assert await kit.append(lease, 0, 4) == "ok"
        for name in ("g4.1", "g4.2"):
            assert await kit.finish(leases[name], 4) == "ok"
        return cls(kit, leases)

    @asynccontextmanager
    async def full(self) -> AsyncIterator[None]:
        """Redis holds more than it may, and has forgotten its scripts."""
        await self.broker.client.script_flush()
        await self.broker.client.config_set("maxmemory", "1mb")
        filler = b"x" * (1 << 20)
        for number in range(4):
            await self.broker.client.config_set("maxmemory", "0")
            await self.broker.client.set(f"{self.broker.keys.prefix}filler:{number}", filler)
        await self.broker.client.config_set("maxmemory", "1mb")
        yield
        await self.broker.client.config_set("maxmemory", "0")


@pytest.fixture(scope="module")
def own_server(
    redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A server whose memory limit these tests may change."""
    folder: Path = tmp_path_factory.mktemp("full")
    server = EmbeddedRedis(folder, 0, binary=redis_server.binary)
    yield server.start_blocking()
    server.stop_blocking()


@pytest.fixture
async def world(own_server: str, run_name: str) -> AsyncIterator[World]:
    """A populated run."""
    broker = await Broker.connect(own_server, run_name, simulated_clock=True)
    await broker.create_run("", CONFIG_HASH)
    await broker.client.set(broker.keys.sim_now, 1_000_000)
    yield await World.make(broker)
    await broker.client.config_set("maxmemory", "0")
    await broker.delete_run()
    await broker.close()


async def acquire(w: World) -> None:
    await w.broker.release_lock(w.kit.learner)
    w.kit.learner = await w.broker.acquire_lock("learner", "l9", TTL_MS)


async def grade(w: World) -> None:
    jobs = await w.broker.take_grading("w", 1)
    verdicts = [Verdict(jobs[0].rollout_id, jobs[0].token, 1.0, "", "text")]
    assert await w.broker.grade_many("w", verdicts, 3, True, 8) == ["ok"]


async def round_trip(w: World) -> None:
    await w.broker.open_round(w.kit.coordinator, "o", 1)
    assert await w.broker.close_round(w.kit.coordinator, "c", 1) == 2
    assert await w.kit.park(w.leases["g4.0"]) == "ok"
    assert await w.broker.round_to_training(w.kit.coordinator, 1)
    await w.broker.finish_round(w.kit.learner, 1)


async def reap(w: World) -> None:
    await w.broker.client.config_set("maxmemory", "0")  # the test's own write
    await w.broker.client.zadd(w.broker.keys.sessions, {"w": 1})
    await w.broker.client.config_set("maxmemory", "1mb")
    counts = await w.broker.reap(w.kit.coordinator, 3)
    assert (counts["sessions"], counts["parked"]) == (1, 1)


async def replace(w: World) -> None:
    await w.broker.client.config_set("maxmemory", "0")  # the test's own write
    await w.broker.client.hset(w.broker.keys.rollout("g4.0"), "retention", "5")
    await w.broker.client.config_set("maxmemory", "1mb")
    assert await w.broker.purge(w.kit.coordinator, "p", 1, "replace") == ["g4.0"]


async def train(w: World) -> None:
    items = [TrainedTokens("g3", 8, 0, 0)]
    assert await w.broker.mark_trained(w.kit.learner, "b3", items, 1)


async def take(w: World) -> None:
    assert [lease.rollout_id for lease in await w.broker.take("v", 1, 1)] == ["g4.3"]


async def finish(w: World) -> None:
    assert await w.kit.finish(w.leases["g4.0"], 4) == "ok"


async def quarantine(w: World) -> None:
    row = ("g4.0", w.leases["g4.0"].token, "bad")
    assert await w.broker.quarantine_many("w", [row]) == ["ok"]


async def device(w: World) -> None:
    claim = await w.broker.take_device(w.kit.learner, 0)
    assert len(claim.owed_by) == 2
    assert await w.broker.return_device(w.kit.learner, claim.turn)


DRAINING: dict[str, Step] = {
    "create_run": lambda w: w.broker.create_run("", CONFIG_HASH),
    "take_device return_device": device,
    "end_feeding": lambda w: w.broker.end_feeding(w.kit.coordinator, "c"),
    "set_meta": lambda w: w.broker.set_paused(True, "full"),
    "acquire_lock release_lock": acquire,
    "renew_lock": lambda w: w.broker.renew_lock(w.kit.learner, TTL_MS),
    "begin_incarnation": lambda w: w.broker.begin_incarnation(w.kit.coordinator, "test"),
    "open_session": lambda w: w.kit.session("new"),
    "heartbeat": lambda w: w.broker.heartbeat("w", TTL_MS, {"doing": "waiting"}),
    "close_session": lambda w: w.broker.close_session("w"),
    "reap": reap,
    "open_round close_round park_many round_to_training finish_round": round_trip,
    "purge": replace,
    "end_group": lambda w: w.broker.end_group(w.kit.learner, "g2", "quarantined", "broken"),
    "set_pin": lambda w: w.broker.set_pin(w.kit.coordinator, True),
    "trim_stream": lambda w: w.broker.trim_outcomes(w.kit.coordinator, "999-0"),
    "take": take,
    "finish_many": finish,
    "quarantine_many": quarantine,
    "bad_version": lambda w: w.broker.report_bad_version("w", 1, "canary"),
    "take_grading grade_many": grade,
    "reserve": lambda w: w.broker.reserve(w.kit.learner, "b1", ["g1"], 0, 3),
    "release": lambda w: w.broker.release(w.kit.learner, "b2"),
    "commit": lambda w: w.broker.commit(w.kit.learner, "b2", {"g2": 2}),
    "mark_trained": train,
    "force_taken": lambda w: w.broker.force_taken(w.kit.learner, "b1", {"g1": (8, 2)}),
    "publish": lambda w: w.broker.publish(w.kit.learner, VersionInfo(2, 1, 0, "{}")),
}
GROWING = ("append_many", "feed", "push_metrics")
READING = ("audit", "backlog", "clock", "ready_groups")


def test_every_script_is_here() -> None:
    folder = Path(ringasync.broker.__file__).parent / "scripts"
    scripts = {path.stem for path in folder.glob("[a-z]*.lua")}
    assert scripts == {*" ".join(DRAINING).split(), *GROWING, *READING}


@pytest.mark.parametrize("name", DRAINING)
async def test_a_draining_script_passes_when_redis_is_full(world: World, name: str) -> None:
    async with world.full():
        await DRAINING[name](world)
    await world.kit.check()


async def test_growing_scripts_change_nothing_when_redis_is_full(world: World) -> None:
    kit, broker, lease = world.kit, world.broker, world.leases["g4.0"]
    before, backlog = await kit.check(), await broker.backlog()
    zombie = world.leases["g4.1"]
    async with world.full():
        items = [item(lease, 0, 4), item(lease, 4, 2), item(zombie, 4, 1), item(lease, 6, 2)]
        statuses = await broker.append_many("w", items)
        assert statuses == ["duplicate", "full", "fenced", "full"]
        assert await broker.feed(kit.coordinator, "late", [new_group("g9")], "later") == -1
        assert not await broker.push_metrics("worker", {"a": 1})
        assert await broker.data_cursor() == "c"
        assert await broker.backlog() == backlog
        assert [group.group_id for group in await broker.ready_groups(5)] == ["g1"]
        assert await kit.check() == before
    assert await broker.append_many("w", items[1:]) == ["ok", "fenced", "ok"]
    assert await broker.feed(kit.coordinator, "late", [new_group("g9")], "later") == 1
    assert await broker.data_cursor() == "later"
    assert await kit.check() == {**before, "open": before["open"] + 4}


async def test_a_full_redis_drains_until_it_takes_appends_again(world: World) -> None:
    kit, broker = world.kit, world.broker
    async with world.full():
        jobs = await broker.take_grading("w", 9)
        assert await kit.grade(jobs, [0.0, 1.0]) == ["ok", "ok"]
        assert await broker.commit(kit.learner, "b2", {"g2": 2})
        for number in range(4):
            await broker.client.delete(f"{broker.keys.prefix}filler:{number}")
        await broker.client.config_set("maxmemory", "64mb")
        assert await kit.append(world.leases["g4.0"], 4, 2) == "ok"
    await kit.check()
