"""A learner on two ranks as its own processes: trains, stops, and ends promptly when one dies."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from learner.launch import first_to_go
from ringasync.errors import CheckpointError, ConfigError

from ..conftest import RedisServer
from .checkpoint_kit import newest_checkpoint
from .kit import (
    Feeder,
    LearnerProcess,
    config_path,
    tiny_model,
    write_config,
)
from .ranked_learner import RankedLearner, begin_training, finished_alone, losses_alone


async def test_two_ranks_train_and_one_goes_on_as_if_it_had_trained_all(
    feeder: Feeder,
    any_redis: RedisServer,
    tmp_path: Path,
    model_dir: Path,
    started: list[RankedLearner],
) -> None:
    expected = await losses_alone(any_redis.url, tmp_path, model_dir, 14)

    await feeder.feed(6)  # two batches and some
    both = await begin_training(feeder, any_redis.url, started, 2)
    os.kill(both.process.pid, signal.SIGTERM)
    assert await both.ended() == 0, both.log()
    assert newest_checkpoint(feeder).meta.step == await feeder.step()
    first = {row["step"] for row in await feeder.metrics()}
    await feeder.feed(8)
    rows = await finished_alone(feeder, any_redis.url, expected)
    assert expected.keys() > first
    for row in rows:
        assert ("2 ranks" in row["arithmetic"]) == (row["step"] in first)


def test_the_rank_that_took_the_others_along_is_found_among_those_gone_at_once() -> None:
    killed, ended = -int(signal.SIGKILL), -int(signal.SIGTERM)
    assert first_to_go({0, 1}, {0: ended, 1: killed}) == 1
    assert first_to_go({0, 1}, {0: 1, 1: killed}) == 1
    assert first_to_go({0, 1}, {0: 7, 1: 7}) == 0
    assert first_to_go({0}, {0: killed, 1: killed}) == 0
    assert first_to_go({1}, {0: ended}) == 0  # the other left in peace


@pytest.mark.parametrize("whom", ["rank 1", "rank 0", "launcher"])
async def test_a_killed_process_ends_the_job_promptly(
    whom: str, feeder: Feeder, any_redis: RedisServer, started: list[RankedLearner]
) -> None:
    await feeder.feed(3)
    learner = await begin_training(feeder, any_redis.url, started, 1)
    victim = learner.launcher if whom == "launcher" else learner.ranks[int(whom[-1])]
    victim.kill()
    code = await learner.ended()
    if whom == "launcher":
        assert code == -signal.SIGKILL
    else:
        assert code == 1
        said = f"learner {whom} (pid {victim.pid}) ended: killed by SIGKILL; it went first"
        assert said in learner.log(), learner.log()


async def test_the_exit_code_of_rank_0_is_that_of_the_learner(
    feeder: Feeder, any_redis: RedisServer, tmp_path: Path, started: list[RankedLearner]
) -> None:
    await feeder.feed(4)
    alone = LearnerProcess.start(config_path(feeder), any_redis.url)
    await feeder.reached(1)
    alone.process.terminate()
    assert await alone.wait() == 0, alone.log()
    tiny_model(tied=False).save_pretrained(tmp_path / "other")  # type: ignore[operator]
    learner = RankedLearner(config_path(feeder), any_redis.url, "--model", str(tmp_path / "other"))
    started.append(learner)
    code = await asyncio.to_thread(learner.process.wait, 60)
    assert code == CheckpointError.exit_code, learner.log()
    assert "of another model" in learner.log()
    assert "Traceback" not in learner.log()


async def test_more_ranks_than_gpus_are_refused_before_any_starts(
    tmp_path: Path, model_dir: Path, started: list[RankedLearner]
) -> None:
    path = write_config(tmp_path, "many", model_dir)
    learner = RankedLearner(path, "redis://127.0.0.1:1/0", "--set", "learner.device=cuda")
    started.append(learner)
    code = await asyncio.to_thread(learner.process.wait, 60)
    assert code == ConfigError.exit_code, learner.log()
    assert "learner.ranks = 2, but 0 CUDA devices are visible" in learner.log()
    assert "set learner.device = 'cpu'" in learner.log()
