"""Redis that cannot write to its disk: roles wait for it, then say what is wrong."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from ringasync.broker.client import Broker
from ringasync.broker.embedded import EmbeddedRedis
from ringasync.errors import BrokerRefusedError
from tests.conftest import CONFIG_HASH, RedisServer

from .kit import Kit


@pytest.fixture
def own_server(redis_server: RedisServer, tmp_path: Path) -> Iterator[str]:
    """A server that this test may spoil."""
    server = EmbeddedRedis(tmp_path / "redis", 0, binary=redis_server.binary)
    yield server.start_blocking()
    server.stop_blocking()


@asynccontextmanager
async def run_on(url: str, name: str, budget_s: float) -> AsyncIterator[Broker]:
    broker = await Broker.connect(url, name, retry_budget_s=budget_s)
    await broker.create_run("", CONFIG_HASH)
    yield broker
    await broker.close()


async def refuse_writes(broker: Broker, folder: Path) -> None:
    """Let a snapshot fail: its folder is gone. Redis then refuses every write with MISCONF."""
    client = broker.client
    os.mkdir(folder)
    await client.config_set("dir", str(folder))
    os.rmdir(folder)
    await client.config_set("save", "3600 1")
    await client.bgsave()
    async with asyncio.timeout(20):
        while (await client.info("persistence"))["rdb_last_bgsave_status"] != "err":  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_a_script_waits_until_redis_can_write_again(
    own_server: str, run_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with run_on(own_server, run_name, budget_s=30) as broker:
        kit = await Kit.make(broker)
        await kit.session("w")
        await kit.feed("g1")
        (lease, *_) = await broker.take("w", 1, 1)
        await refuse_writes(broker, tmp_path / "gone")
        appending = asyncio.create_task(kit.append(lease, 0, 4))
        beating = asyncio.create_task(broker.heartbeat("w", 60_000, {}))
        done, _ = await asyncio.wait({appending, beating}, timeout=1.5)
        assert not done
        await broker.client.config_set("stop-writes-on-bgsave-error", "no")
        assert await appending == "ok"
        assert (await beating).alive
        assert (await broker.ledger())["accepted"] == 4
        await kit.check()
    assert "redis cannot write to its disk, retrying" in capsys.readouterr().out


async def test_a_role_that_starts_waits_until_redis_can_write_again(
    own_server: str, run_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with run_on(own_server, run_name, budget_s=30) as broker:
        await refuse_writes(broker, tmp_path / "gone")
        joining = asyncio.create_task(Broker.connect(own_server, run_name, retry_budget_s=30))
        done, _ = await asyncio.wait({joining}, timeout=1.5)
        assert not done
        await broker.client.config_set("stop-writes-on-bgsave-error", "no")
        joined = await joining
        assert await joined.ledger() == await broker.ledger()
        await joined.close()
    assert "redis cannot write to its disk, retrying" in capsys.readouterr().out


async def test_after_the_budget_the_refusal_names_the_remedy(
    own_server: str, run_name: str, tmp_path: Path
) -> None:
    async with run_on(own_server, run_name, budget_s=0.2) as broker:
        await refuse_writes(broker, tmp_path / "gone")
        with pytest.raises(BrokerRefusedError, match=r"refuses writes .*MISCONF.*free memory or"):
            await broker.set_paused(True, "test")
        await broker.client.config_set("stop-writes-on-bgsave-error", "no")
