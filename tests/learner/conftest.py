"""Fixtures of the learner's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from ringasync.broker.client import Broker
from ringasync.broker.types import Fence

from ..conftest import CONFIG_HASH, RedisServer
from .kit import SESSION_TTL_MS, Feeder, tiny_model, write_config
from .ranked_learner import RankedLearner


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 in HF format."""
    directory = tmp_path_factory.mktemp("tiny-qwen3")
    tiny_model().save_pretrained(directory)  # type: ignore[operator]
    return directory


@pytest.fixture
async def feeder(
    any_redis: RedisServer, tmp_path: Path, model_dir: Path, run_name: str
) -> AsyncIterator[Feeder]:
    """A fresh pipelined run, to be fed by hand."""
    made = await Feeder.make(any_redis.url, write_config(tmp_path, run_name, model_dir))
    yield made
    await made.close()


@pytest.fixture
async def run(any_redis: RedisServer, run_name: str) -> AsyncIterator[tuple[Broker, Fence]]:
    """A run with the learner's lock."""
    broker = await Broker.connect(any_redis.url, run_name)
    await broker.create_run("", CONFIG_HASH, "rounds")
    yield broker, await broker.acquire_lock("learner", "test", SESSION_TTL_MS)
    await broker.delete_run()
    await broker.close()


@pytest.fixture
def started() -> Iterator[list[RankedLearner]]:
    """Learners on two ranks; what is left of them is killed."""
    learners: list[RankedLearner] = []
    yield learners
    for one in learners:
        one.kill()
