"""A learner that changes its engine, its ZeRO stage and its ranks from life to life."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
from pathlib import Path

import pytest

from ..conftest import RedisServer
from .kit import Feeder, LearnerProcess, config_path, until
from .ranked_learner import RankedLearner, begin_training, finished_alone, losses_alone

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
    ),
    pytest.mark.timeout(600),
]


def _set(stage: int) -> list[str]:
    return ["--set", "learner.backend=deepspeed", "--set", f"learner.zero_stage={stage}"]


async def test_zero_3_on_two_ranks_goes_on_as_zero_1_on_one_and_as_torch(
    feeder: Feeder,
    any_redis: RedisServer,
    tmp_path: Path,
    model_dir: Path,
    started: list[RankedLearner],
) -> None:
    expected = await losses_alone(any_redis.url, tmp_path, model_dir, 14)

    await feeder.feed(6)  # two batches and some
    both = await begin_training(feeder, any_redis.url, started, 2, *_set(3))
    os.kill(both.process.pid, signal.SIGTERM)
    assert await asyncio.to_thread(both.process.wait, 90) == 0, both.log()
    reached = await feeder.step()
    await feeder.feed(3)
    one = LearnerProcess.start(config_path(feeder), any_redis.url, extra=_set(1))

    async def trained() -> bool:
        return await feeder.step() > reached

    await until(trained, "a step of one rank", 150)
    one.process.terminate()
    assert await one.wait() == 0, one.log()
    await feeder.feed(5)
    rows = await finished_alone(feeder, any_redis.url, expected)
    engines = [" ".join(part for part in row["arithmetic"].split(", ")[1:]) for row in rows]
    assert any("ZeRO 3 2 ranks" in one for one in engines), engines
    assert any("ZeRO 1 torch" in one for one in engines), engines
    assert any("ZeRO" not in one for one in engines), engines
