"""Long-lived commands in the event loop, with signals in place."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import uvloop

from ringasync.broker.embedded import EmbeddedRedis
from ringasync.config.schema import Config
from ringasync.runtime.runfiles import claim
from ringasync.runtime.shutdown import Shutdown
from ringasync.runtime.up import Up, UpOptions, say


def run_in_loop(main: Callable[[], Awaitable[int]]) -> int:
    """Run ``main`` on uvloop to its end."""

    async def body() -> int:
        return await main()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(body())


def run_up(options: UpOptions) -> int:
    """``ringasync up``; returns its exit code."""

    async def main() -> int:
        shutdown = Shutdown(lambda: command.kill_at_once())
        command = Up(options, shutdown)
        shutdown.install()
        return await command.run()

    return run_in_loop(main)


def run_redis(config: Config) -> int:
    """``ringasync redis``: an embedded Redis in the run's folder until a signal comes."""

    async def main() -> int:
        server = EmbeddedRedis(config.run_dir / "redis", config.redis.maxmemory_bytes)
        shutdown = Shutdown(lambda: server.kill())
        shutdown.install()
        with claim(config.run_dir):
            await server.start()
            try:
                say(f"Redis of run {config.run.name}: {server.url} (Ctrl-C stops it)")
                await shutdown.requested.wait()
            finally:
                await server.stop()
        return 0

    return run_in_loop(main)
