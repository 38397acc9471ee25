"""``python -m workers`` as a process: exit codes, signals, a kill, with a real tiny model."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ringasync import SCHEMA_VERSION
from ringasync.config.load import resolved_toml
from tests.observability.scrape import free_ports
from tests.observability.test_stalls import get

from .test_transformers_engine import write_model
from .world import World, until

MakeWorld = Callable[..., Coroutine[Any, Any, World]]
Spawn = Callable[..., Any]

pytestmark = pytest.mark.slow
EXIT_S = 30.0
START_S = 50.0
"""Importing torch and transformers takes seconds, and many times that on a busy machine."""


@asynccontextmanager
async def spawned(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A worker process; killed if the block leaves it running."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "workers", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        output, _ = await process.communicate()
        print(output.decode())  # shown by pytest when the test fails


async def _exit_code(process: asyncio.subprocess.Process) -> int:
    async with asyncio.timeout(EXIT_S):
        return await process.wait()


async def _world(make_world: MakeWorld, tmp_path: Path, **settings: Any) -> tuple[World, list[str]]:
    """A run whose version 1 is a real model, and the arguments of its workers."""
    world = await make_world(flush_tokens=4, flush_ms=20, **settings)
    model = write_model(tmp_path / "model", 1, tied=True)
    await world.publish_folder(1, model)
    config = tmp_path / "run.toml"
    config.write_text(resolved_toml(world.config))
    return world, [str(config), "--redis-url", world.url, "--model", str(model)]


async def test_help_and_wrong_configurations(tmp_path: Path) -> None:
    async with spawned("--help") as process:
        output, _ = await process.communicate()
        assert process.returncode == 0
        assert b"--worker-id" in output
    async with spawned(str(tmp_path / "absent.toml")) as process:
        output, _ = await process.communicate()
        assert process.returncode == 2
        assert b"absent.toml" in output
    (tmp_path / "wrong.toml").write_text("[worker]\nmax_concurent = 3\n")
    async with spawned(str(tmp_path / "wrong.toml")) as process:
        output, _ = await process.communicate()
        assert process.returncode == 2
        assert b"max_concurrent" in output


async def test_a_worker_generates_drains_on_sigterm_and_a_killed_one_is_resumed(
    make_world: MakeWorld, tmp_path: Path
) -> None:
    # Two at a time, so that there is work left for three workers in turn.
    world, arguments = await _world(make_world, tmp_path, session_ttl_ms=1500, max_concurrent=2)
    await world.feed("g1", size=40, max_new_tokens=120)
    ids = [f"g1.{i}" for i in range(40)]

    async def tokens() -> int:
        return sum([await world.length(rollout_id) for rollout_id in ids])

    async def some_tokens() -> bool:
        return await tokens() > 8

    async with spawned(*arguments, "--worker-id", "killed") as process:
        await until(some_tokens, "the first worker's tokens", START_S)
        process.send_signal(signal.SIGKILL)
        assert await _exit_code(process) == -signal.SIGKILL
    kept = await tokens()
    assert "leased" in await world.states(*ids)

    async def reaped() -> bool:
        await world.broker.reap(world.coordinator, 5)
        return "leased" not in await world.states(*ids)

    await until(reaped, "the dead session's leases to return")
    async with spawned(*arguments, "--worker-id", "drained") as process:

        async def more_tokens() -> bool:
            return await tokens() > kept + 8

        await until(more_tokens, "the second worker's tokens", START_S)
        process.send_signal(signal.SIGTERM)
        assert await _exit_code(process) == 0
    assert "leased" not in await world.states(*ids)
    assert await world.broker.sessions() == []
    for rollout_id in ids:
        await world.record(rollout_id)
    await world.assert_balanced()


async def test_a_node_that_goes_away_in_the_middle_of_a_drain_loses_nothing(
    make_world: MakeWorld, tmp_path: Path
) -> None:
    """SIGTERM, and SIGKILL before the drain has reached Redis; another worker does the rest."""
    world, arguments = await _world(make_world, tmp_path, session_ttl_ms=1500, max_concurrent=4)
    await world.feed("g1", size=4, max_new_tokens=150)
    ids = [f"g1.{i}" for i in range(4)]

    async def lengths() -> list[int]:
        return [await world.length(one) for one in ids]

    async with spawned(*arguments, "--worker-id", "gone") as process:

        async def all_have_tokens() -> bool:
            return all(await lengths())

        await until(all_have_tokens, "tokens of all four", START_S)
        # Redis takes no writes, so the drain has begun and cannot end.
        await world.broker.client.client_pause(60_000, all=False)
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        async with asyncio.timeout(EXIT_S):
            while b"parking rollouts" not in await process.stdout.readline():
                pass
        process.send_signal(signal.SIGKILL)
        assert await _exit_code(process) == -signal.SIGKILL
    assert await world.states(*ids) == {"leased"}
    kept = await lengths()
    await world.broker.client.client_unpause()

    async def reaped() -> bool:
        await world.broker.reap(world.coordinator, 5)
        return await world.states(*ids) == {"parked"}

    await until(reaped, "the dead session's leases to return")
    assert await lengths() == kept
    async with spawned(*arguments, "--worker-id", "other"):

        async def finished() -> bool:
            return await world.states(*ids) == {"finished"}

        await until(finished, "all four to be finished by the other worker", START_S)
    for one, tokens in zip(ids, kept, strict=True):
        assert len((await world.record(one)).token_ids) >= tokens
    await world.assert_balanced()


async def test_a_second_signal_ends_at_once(make_world: MakeWorld, tmp_path: Path) -> None:
    world, arguments = await _world(make_world, tmp_path)
    async with spawned(*arguments) as process:

        async def has_session() -> bool:
            return bool(await world.broker.sessions())

        await until(has_session, "a session", START_S)
        # Redis stands still, so that the drain cannot end.
        await world.broker.client.client_pause(8000)
        process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert await _exit_code(process) == 130


async def test_another_configuration_may_not_join(make_world: MakeWorld, tmp_path: Path) -> None:
    _, arguments = await _world(make_world, tmp_path)
    async with spawned(*arguments, "--set", "sampling.temperature=0.5") as process:
        output, _ = await process.communicate()
        assert process.returncode == 3
        assert b"configuration" in output


async def test_another_schema_may_not_join(make_world: MakeWorld, tmp_path: Path) -> None:
    world, arguments = await _world(make_world, tmp_path)
    await world.broker.client.hset(world.broker.keys.meta, "schema", "999")
    async with spawned(*arguments) as process:
        output, _ = await process.communicate()
        assert process.returncode == 3
        assert f"has schema 999, this process has {SCHEMA_VERSION}".encode() in output
        assert b"use the same build of ringasync as the coordinator" in output


async def test_a_worker_that_generates_nothing_is_named_in_log_top_and_health(
    make_world: MakeWorld, tmp_path: Path
) -> None:
    port = free_ports()
    world, arguments = await _world(
        make_world,
        tmp_path,
        engine="scripted",
        engine_options={"step_interval_s": 3600},
        sections={
            "weights": {"canary": False},
            "observability": {"stall_report_s": 1.0},
            "metrics": {"port": port},
        },
    )
    await world.feed("g1")
    async with spawned(*arguments, "--worker-id", "silent") as process:

        async def named() -> bool:
            rows = await world.broker.sessions()
            return any("tokens of 2 active rollouts" in row.get("stall", "") for row in rows)

        await until(named, "the worker to be named in its session", START_S)
        code, said = await asyncio.to_thread(get, port + 2, "/healthz")
        assert (code, said["worker"]) == (503, "silent")
        assert "this worker generates nothing; owed by the inference engine" in said["stalls"][0]
        assert (await asyncio.to_thread(get, port + 2, "/livez"))[0] == 200
        process.send_signal(signal.SIGTERM)
        assert await _exit_code(process) == 0
    log = (world.config.run_dir / "logs").glob("*.jsonl")
    assert any("waiting too long" in file.read_text() for file in log)
