"""The watched embedded Redis: it comes back, also when it is killed while it comes back."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
import redis

from ringasync.broker.embedded import EmbeddedRedis
from ringasync.runtime.redis_keeper import RedisKeeper

DEADLINE_S = 90


async def test_a_redis_that_dies_while_it_is_started_again_is_started_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, started = EmbeddedRedis.start, []

    async def start_and_kill_the_second(server: EmbeddedRedis) -> str:
        url = await start(server)
        assert server.pid is not None
        started.append(server.pid)
        if len(started) == 2:
            os.kill(server.pid, signal.SIGKILL)
        return url

    monkeypatch.setattr(EmbeddedRedis, "start", start_and_kill_the_second)
    said: list[str] = []
    keeper = RedisKeeper(tmp_path / "redis", 1 << 26, said.append)
    async with keeper.running() as url:
        with redis.Redis.from_url(url) as client:
            client.set("kept", "1")
        os.kill(started[0], signal.SIGKILL)
        async with asyncio.timeout(DEADLINE_S):
            while len(started) < 3 or not answers(url):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        with redis.Redis.from_url(url) as client:
            assert client.get("kept") == b"1"
    assert any("did not come up, trying again" in line for line in said)


def answers(url: str) -> bool:
    try:
        with redis.Redis.from_url(url) as client:
            return bool(client.ping())
    except redis.ConnectionError:
        return False
