"""The connection breaks after Redis has acted and before it answered: the client's own repeat must
bring the first answer, or say ``duplicate``, and change nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import ringasync.broker
from ringasync.broker.client import Broker
from ringasync.broker.core import script_source
from ringasync.broker.types import TrainedTokens, Verdict, VersionInfo
from tests.conftest import CONFIG_HASH, RedisServer

from .kit import TTL_MS, Kit, item, new_group

SCRIPTS = Path(ringasync.broker.__file__).parent / "scripts"


class LossyProxy:
    """Forwards bytes to Redis; when told to, it cuts the connection instead of the next answer."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.lose = False
        self.lost = 0

    async def start(self) -> str:
        """Listen; returns the URL."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"

    async def stop(self) -> None:
        """Stop listening and cut what is left."""
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        redis_reader, redis_writer = await asyncio.open_connection(*self._target)
        upward = asyncio.create_task(self._pump(reader, redis_writer))
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await self._answer(redis_reader, writer)
        finally:
            upward.cancel()
            for end in (writer, redis_writer):
                end.close()
                with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                    await end.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            if self.lose:
                self.lose = False
                self.lost += 1
                return
            writer.write(data)
            await writer.drain()

    @staticmethod
    async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()


class Lossy:
    """A kit whose next answer can be lost."""

    def __init__(self, kit: Kit, proxy: LossyProxy) -> None:
        self.kit, self.broker, self.proxy = kit, kit.broker, proxy

    @contextlib.asynccontextmanager
    async def losing(self) -> AsyncIterator[None]:
        """Within, exactly one answer is lost."""
        before = self.proxy.lost
        self.proxy.lose = True
        yield
        assert self.proxy.lost == before + 1


@pytest.fixture
async def lossy(redis_server: RedisServer, run_name: str) -> AsyncIterator[Lossy]:
    """A broker behind the proxy."""
    parts = urlsplit(redis_server.url)
    proxy = LossyProxy(parts.hostname or "", parts.port or 0)
    broker = await Broker.connect(await proxy.start(), run_name, simulated_clock=True)
    await broker.create_run("", CONFIG_HASH)
    await broker.client.set(broker.keys.sim_now, 1_000_000)
    kit = await Kit.make(broker)
    for path in SCRIPTS.glob("[a-z]*.lua"):  # or the lost answer would be "no such script"
        await broker.client.script_load(script_source(path.stem, True).decode())
    yield Lossy(kit, proxy)
    await broker.delete_run()
    await broker.close()
    await proxy.stop()


async def test_feeding_and_working(lossy: Lossy) -> None:
    kit, broker = lossy.kit, lossy.broker
    async with lossy.losing():
        assert await broker.feed(kit.coordinator, "r1", [new_group("g1", 3)], "cursor") == 1
    async with lossy.losing():
        await kit.session("w")
    async with lossy.losing():
        leases = await broker.take("w", 2, 1)
    assert sorted(lease.rollout_id for lease in leases) == ["g1.0", "g1.1"]
    assert await broker.client.scard(broker.keys.leases("w")) == 2
    first, second = leases
    async with lossy.losing():
        assert await broker.append_many("w", [item(first, 0, 4), item(second, 0, 2)]) == [
            "duplicate",
            "duplicate",
        ]
    async with lossy.losing():
        assert await kit.finish(first, 4) == "duplicate"
    async with lossy.losing():
        assert await kit.park(second) == "duplicate"
    async with lossy.losing():
        (job,) = await broker.take_grading("w", 5)
    async with lossy.losing():
        assert await kit.grade([job], [1.0]) == ["duplicate"]
    async with lossy.losing():
        assert (await broker.heartbeat("w", TTL_MS, {})).alive
    async with lossy.losing():
        await broker.close_session("w")
    assert await kit.check() == {"open": 2, "graded": 4}


async def test_grading_errors_count_once(lossy: Lossy) -> None:
    kit, broker = lossy.kit, lossy.broker
    await kit.feed("g1", size=1)
    await kit.session("w")
    (lease,) = await broker.take("w", 1, 1)
    await kit.finish(lease, 0)
    (job,) = await broker.take_grading("w", 1)
    verdict = Verdict(job.rollout_id, job.token, None, "boom")
    async with lossy.losing():
        assert await broker.grade_many("w", [verdict], 3, True, 0) == ["duplicate"]
    (again,) = await broker.take_grading("w", 1)
    assert again.attempts == 1


async def test_the_learners_path(lossy: Lossy) -> None:
    kit, broker = lossy.kit, lossy.broker
    await kit.ready("g1")
    async with lossy.losing():
        groups, stale = await broker.reserve(kit.learner, "b1", ["g1"], 0, 3)
    assert ([group.group_id for group in groups], stale) == (["g1"], [])
    async with lossy.losing():
        await broker.commit(kit.learner, "b1", {"g1": 2})
    async with lossy.losing():
        await broker.mark_trained(kit.learner, "b1", [TrainedTokens("g1", 8, 0, 0)], 1)
    async with lossy.losing():
        await broker.publish(kit.learner, VersionInfo(2, 1, 0, "{}"))
    async with lossy.losing():
        assert (await broker.take_device(kit.learner, 0)).turn == 1
    async with lossy.losing():
        assert not await broker.return_device(kit.learner, 1)  # it was done the first time
    async with lossy.losing():
        assert await broker.force_taken(kit.learner, "b2", {"g7": (5, 1)}) is False
    assert await kit.check() == {"trained": 8, "taken": 5}
    assert (await broker.ledger())["accepted"] == 13


async def test_the_coordinators_path(lossy: Lossy) -> None:
    kit, broker = lossy.kit, lossy.broker
    await kit.feed("g1", size=1)
    async with lossy.losing():
        await broker.open_round(kit.coordinator, "o1", 1)
    async with lossy.losing():
        assert await broker.close_round(kit.coordinator, "c1", 1) == 1
    fields = await broker.rollout("g1.0")
    assert fields is not None
    assert fields["retention"] == "1"
    async with lossy.losing():
        assert await broker.round_to_training(kit.coordinator, 1)
    async with lossy.losing():
        await broker.finish_round(kit.learner, 1)
    async with lossy.losing():
        assert await broker.purge(kit.coordinator, "p1", 0, "drop_group") == ["g1"]
    async with lossy.losing():
        assert await broker.set_pin(kit.coordinator, True) == 1
    async with lossy.losing():
        await broker.renew_lock(kit.coordinator, TTL_MS)
    await kit.check()


async def test_a_lock_whose_answer_was_lost_is_ours(lossy: Lossy) -> None:
    kit, broker = lossy.kit, lossy.broker
    await broker.release_lock(kit.learner)
    broker_id = await broker._server_run_id()

    async def known() -> str:
        return broker_id

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(broker, "_server_run_id", known)  # so that the lost answer is the lock's
        async with lossy.losing():
            third = await broker.acquire_lock("learner", "l3", TTL_MS)
    assert third.token == kit.learner.token + 1
    await broker.renew_lock(third, TTL_MS)
