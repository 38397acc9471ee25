"""A learner on two ranks as its own processes: trains, stops, and ends promptly when one dies."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from learner.launch import first_to_go
from ringasync.errors import CheckpointError, ConfigError

from ..conftest import RedisServer
from .checkpoint_kit import newest_checkpoint
from .kit import (
    Feeder,
    LearnerProcess,
    check_ledger,
    config_path,
    tiny_model,
    until,
    write_config,
)

PROMPT_S = 12.0
"""From the death of one process to the end of the last: seconds, on a loaded machine."""


class RankedLearner:
    """``python -m learner`` on two ranks, with its launcher."""

    def __init__(self, config: Path, url: str, *extra: str) -> None:
        self.log_path = config.with_suffix(".log")
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "learner", str(config), "--redis-url", url),
                    *("--set", "learner.ranks=2", *extra),
                ],
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
                | {"CUDA_VISIBLE_DEVICES": ""},
                start_new_session=True,
            )
        self.launcher = psutil.Process(self.process.pid)
        self.ranks: list[psutil.Process] = []

    def find_ranks(self) -> bool:
        """Whether both ranks have begun; keeps them in order."""
        found = {}
        for child in self.launcher.children():
            try:
                found[child.environ().get("RANK", "")] = child
            except psutil.Error:
                return False
        found.pop("", None)
        self.ranks = [found[key] for key in sorted(found)]
        return len(self.ranks) == 2

    def log(self) -> str:
        """What all of them wrote."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")[-8000:]

    async def ended(self) -> int:
        """The launcher's exit code, once no process is left; fails where that takes long."""
        began_s = time.monotonic()

        async def gone() -> bool:
            return self.process.poll() is not None and not any(
                one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in self.ranks
            )

        await until(gone, f"the end of all processes:\n{self.log()}", PROMPT_S)
        assert time.monotonic() - began_s < PROMPT_S
        return int(self.process.returncode)

    def kill(self) -> None:
        """Leave nothing behind."""
        for one in (*self.ranks, self.launcher):
            try:
                one.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()


@pytest.fixture
def started() -> Iterator[list[RankedLearner]]:
    learners: list[RankedLearner] = []
    yield learners
    for one in learners:
        one.kill()


async def _training(
    feeder: Feeder, url: str, started: list[RankedLearner], step: int
) -> RankedLearner:
    """A learner of two ranks that has trained ``step`` batches."""
    learner = RankedLearner(config_path(feeder), url)
    started.append(learner)

    async def begun() -> bool:
        assert learner.process.poll() is None, learner.log()
        return learner.find_ranks()

    await until(begun, "both ranks", 60)

    async def trained() -> bool:
        assert learner.process.poll() is None, learner.log()
        return await feeder.step() >= step

    await until(trained, f"step {step}", 60)
    return learner


async def test_two_ranks_train_and_one_goes_on_as_if_it_had_trained_all(
    feeder: Feeder,
    any_redis: RedisServer,
    tmp_path: Path,
    model_dir: Path,
    started: list[RankedLearner],
) -> None:
    reference = await Feeder.make(any_redis.url, write_config(tmp_path, "alone", model_dir))
    await reference.feed(14)
    alone = LearnerProcess.start(config_path(reference), any_redis.url)
    assert await alone.wait() == 0, alone.log()
    expected = {row["step"]: row["loss"] for row in await reference.metrics()}
    await reference.close()

    await feeder.feed(6)  # two batches and some
    both = await _training(feeder, any_redis.url, started, 2)
    os.kill(both.process.pid, signal.SIGTERM)
    assert await both.ended() == 0, both.log()
    assert newest_checkpoint(feeder).meta.step == await feeder.step()
    first = {row["step"] for row in await feeder.metrics()}
    await feeder.feed(8)
    learner = LearnerProcess.start(config_path(feeder), any_redis.url)
    assert await learner.wait() == 0, learner.log()
    rows = await feeder.metrics()
    assert {row["step"] for row in rows} == expected.keys() > first
    for row in rows:
        assert row["loss"] == pytest.approx(expected[row["step"]], rel=1e-5, abs=1e-7)
        assert ("2 ranks" in row["arithmetic"]) == (row["step"] in first)
    await check_ledger(feeder, 5 * 120)


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
    learner = await _training(feeder, any_redis.url, started, 1)
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
