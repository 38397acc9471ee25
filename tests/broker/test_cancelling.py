"""A cancelled task ends, wherever in its talk with Redis it is; see ``broker.cancelling``."""

from __future__ import annotations

import asyncio

import redis.asyncio as aredis

from ringasync.broker.client import Broker
from tests.conftest import RedisServer

MOMENTS = 120
"""Turns of the event loop; a PING takes about ten."""


async def cancelled_at(moment: int, client: aredis.Redis) -> asyncio.Task[None]:
    """A loop of PING that was cancelled once, after so many turns of the event loop."""

    async def work() -> None:
        while True:
            await client.ping()

    task = asyncio.create_task(work())
    for _ in range(moment):
        await asyncio.sleep(0)
    task.cancel()
    return task


async def test_a_loop_that_talks_to_redis_ends_when_it_is_cancelled(
    any_redis: RedisServer,
) -> None:
    """On Python 3.11 a third of them went on: the cancellation was lost within ``wait_for``."""
    async with aredis.from_url(any_redis.url, socket_timeout=30) as client:
        tasks = [await cancelled_at(moment, client) for moment in range(MOMENTS)]
        _, left = await asyncio.wait(tasks, timeout=5)
        for task in left:
            while not task.done():
                task.cancel()
                await asyncio.wait({task}, timeout=0.01)
        assert not left
        assert await client.ping()


async def test_what_follows_a_cancelled_command_gets_its_own_answer(broker: Broker) -> None:
    """The connection whose answer nobody read is not used again."""
    for moment in range(MOMENTS):
        task = await cancelled_at(moment, broker.client)
        await asyncio.wait({task})
        assert await broker.client.echo(str(moment)) in (str(moment), str(moment).encode())
