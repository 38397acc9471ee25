"""Roles that come to a run from outside: `health`, `--prepare`, and who is turned away."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ringasync.broker.client import Broker
from ringasync.broker.embedded import EmbeddedRedis
from ringasync.cli.main import app
from ringasync.config.load import config_hash, load_config, resolved_json
from ringasync.runtime.runfiles import RunRecord, read_record

ROOT = Path(__file__).parents[2]
TEXT = """
[run]
name = "small"
dir = "{runs}"
[model]
path = "a/model"
[[data.tasks]]
name = "sums"
kind = "mathematics"
"""


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(TEXT.format(runs=tmp_path / "runs"), encoding="utf-8")
    return path


@pytest.fixture
async def broker(config_path: Path) -> AsyncIterator[Broker]:
    """Client of a real Redis that knows the run."""
    config = load_config(config_path)
    server = EmbeddedRedis(config.run_dir / "redis", 64 << 20)
    url = await server.start()
    client = await Broker.connect(url, "small")
    await client.create_run(resolved_json(config), config_hash(config))
    RunRecord("small", str(config_path), config_hash(config), url, "m").write(config.run_dir)
    yield client
    await client.close()
    await server.stop()


async def ringasync(*arguments: str | Path) -> tuple[int, str]:
    """Exit code and all output of the command, run as a process."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RINGASYNC_")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "ringasync", *map(str, arguments)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment | {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "HF_HUB_OFFLINE": "1"},
    )
    out, _ = await asyncio.wait_for(process.communicate(), 90)
    return process.returncode or 0, out.decode()


async def health(role: str, config_path: Path) -> tuple[int, str]:
    """The same for ``ringasync health``, which starts nothing: in a thread of this process."""
    arguments = ["health", role, "--run", str(config_path)]
    answer = await asyncio.to_thread(CliRunner().invoke, app, arguments)
    return answer.exit_code, answer.output


async def test_health_knows_a_living_session_of_this_host(
    broker: Broker, config_path: Path
) -> None:
    code, out = await health("worker", config_path)
    assert (code, "no worker of host" in out) == (1, True)
    await broker.open_session("w-far", "worker", 60_000, {"host": "elsewhere"})
    await broker.open_session("g-here", "grader", 60_000, {"host": socket.gethostname()})
    assert (await health("worker", config_path))[0] == 1
    await broker.open_session("w-here", "worker", 60_000, {"host": socket.gethostname()})
    code, out = await health("worker", config_path)
    assert code == 0
    assert "w-here: heartbeat" in out
    assert "w-far" not in out


async def test_health_is_bad_once_heartbeats_stop(broker: Broker, config_path: Path) -> None:
    await broker.open_session("w-late", "worker", 1, {"host": socket.gethostname()})
    began_ms = await broker.now_ms()
    # Each question is a round trip to Redis.
    while await broker.now_ms() <= began_ms + 1:
        pass
    assert (await health("worker", config_path))[0] == 1


async def test_health_refuses_an_unknown_role(config_path: Path) -> None:
    code, out = await ringasync("health", "wroker", "--run", config_path)
    assert code == 2
    assert "no role 'wroker': name one of coordinator, worker" in out


async def test_worker_with_another_configuration_is_turned_away(
    broker: Broker, config_path: Path
) -> None:
    code, out = await ringasync("worker", config_path, "--set", "grader.in_worker=false")
    assert code == 3
    assert "run 'small' has configuration" in out
    assert "use the configuration the run" in out
    assert await broker.sessions() == []


async def test_worker_of_another_schema_is_turned_away(broker: Broker, config_path: Path) -> None:
    await broker.client.hset(broker.keys.meta, "schema", "99")
    code, out = await ringasync("worker", config_path)
    assert code == 3
    assert "run 'small' has schema 99, this process has 1: use the same build" in out
    assert await broker.sessions() == []


async def test_a_role_waits_for_the_starting_model_where_it_is_told_to(
    broker: Broker, config_path: Path
) -> None:
    config = load_config(config_path)
    url = (config.run_dir / "redis" / "redis.url").read_text().strip()
    record = RunRecord(
        "small", str(config_path), config_hash(config), url, ""
    )  # as while it is built
    record.write(config.run_dir)
    command = ("worker", str(config_path), "--set", "model.path=starter", "--redis-url", url)
    code, out = await ringasync(*command)
    assert code == 2
    assert "holds no run that built one" in out
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "ringasync", *command, "--wait"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    async with asyncio.timeout(90):
        assert b"waiting for" in await process.stdout.readline()
        dataclasses.replace(record, model="a/model").write(config.run_dir)
        rest, _ = await process.communicate()
    # It goes on to join, and is turned away there: another configuration than the run's.
    assert process.returncode == 3
    assert b"run 'small' has configuration" in rest


async def test_redis_of_another_host_without_password_is_refused(config_path: Path) -> None:
    code, out = await ringasync("worker", config_path, "--redis-url", "redis://redis:6379/0")
    assert code == 3
    assert "no password is given: set RINGASYNC_REDIS_PASSWORD" in out


async def test_prepare_leaves_the_record_that_other_roles_need(
    broker: Broker, config_path: Path
) -> None:
    """The coordinator then ends, for there is no such model."""
    config = load_config(config_path)
    (config.run_dir / "run.json").unlink()
    url = (config.run_dir / "redis" / "redis.url").read_text().strip()
    command = ("coordinator", config_path, "--prepare", "--redis-url", url)
    code, out = await ringasync(*command)
    assert code != 0, out
    record = read_record(config.run_dir)
    assert record is not None
    assert record.model == "a/model"
    assert (config.run_dir / "config.json").exists()
