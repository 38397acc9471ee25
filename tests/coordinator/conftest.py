"""A run with a real Redis and real time, for the coordinator's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from ringasync.broker.client import Broker
from ringasync.config.schema import Config
from tests.conftest import RedisServer
from tests.coordinator.crew import make_config


@pytest.fixture
def config(tmp_path: Path, run_name: str) -> Config:
    """A small pipelined run of four steps."""
    return make_config(tmp_path, run_name)


@pytest.fixture
async def live(any_redis: RedisServer, run_name: str) -> AsyncIterator[Broker]:
    """A broker client with the real clock; the run is made by the coordinator under test."""
    client = await Broker.connect(any_redis.url, run_name)
    yield client
    await client.delete_run()
    await client.close()


@pytest.fixture
def redis_url(any_redis: RedisServer) -> str:
    """Address of the server that ``live`` uses."""
    return any_redis.url


def pytest_make_parametrize_id(val: Any) -> str | None:
    """Short test ids."""
    return str(val) if isinstance(val, str | int | float) else None
