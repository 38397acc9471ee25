"""Long-lived commands in the event loop, with signals in place."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import uvloop

from ringasync.config.schema import Config
from ringasync.runtime.process import RoleSpec
from ringasync.runtime.redis_keeper import RedisKeeper
from ringasync.runtime.role import EMBEDDED_URL_FILE
from ringasync.runtime.roles import Place, role_specs
from ringasync.runtime.runfiles import claim
from ringasync.runtime.shutdown import EXIT_INTERRUPTED, Shutdown
from ringasync.runtime.starter import prepare_run
from ringasync.runtime.up import Up, UpOptions, say


def run_in_loop(main: Callable[[], Awaitable[int]]) -> int:
    """Run ``main`` on uvloop to its end."""

    async def body() -> int:
        return await main()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(body())


def run_up(
    options: UpOptions, make_specs: Callable[[Config, Place], list[RoleSpec]] = role_specs
) -> int:
    """``ringasync up``; returns its exit code."""

    async def main() -> int:
        shutdown = Shutdown(lambda: command.kill_at_once())
        command = Up(options, shutdown, make_specs=make_specs)
        shutdown.install()
        return await command.run()

    return run_in_loop(main)


def run_redis(config: Config) -> int:
    """``ringasync redis``: an embedded Redis in the run's folder until a signal comes."""

    async def main() -> int:
        folder = config.run_dir / EMBEDDED_URL_FILE.parent
        keeper = RedisKeeper(folder, config.redis.maxmemory_bytes, say)
        shutdown = Shutdown(keeper.stop_at_once)
        shutdown.install()
        with claim(config.run_dir):
            async with keeper.running() as url:
                say(f"Redis of run {config.run.name}: {url} (Ctrl-C stops it)")
                await shutdown.requested.wait()
        return 0

    return run_in_loop(main)


def run_prepare(config: Config, config_path: Path, overrides: Sequence[str], url: str) -> str:
    """The run's folder and starting model, before a role begins; after a signal, the end."""
    model = ""

    async def main() -> int:
        nonlocal model
        shutdown = Shutdown()
        shutdown.install()
        model = await prepare_run(config, config_path, overrides, url, shutdown) or ""
        return 0 if model else EXIT_INTERRUPTED

    if code := run_in_loop(main):
        raise SystemExit(code)
    return model
