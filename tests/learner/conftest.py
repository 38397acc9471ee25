"""Fixtures of the learner's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ..conftest import RedisServer
from .kit import Feeder, tiny_model, write_config


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
