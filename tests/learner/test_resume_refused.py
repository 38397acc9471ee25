"""A learner that must not go on says why, and leaves what it found as it was."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from learner.checkpoint import list_checkpoints
from learner.rank_process import LAUNCHER_PID_VARIABLE
from ringasync.errors import CheckpointError, ConfigError, JournalError

from ..conftest import RedisServer
from .checkpoint_kit import newest_checkpoint
from .kit import (
    Feeder,
    LearnerProcess,
    check_ledger,
    config_path,
    tiny_model,
    write_config,
)


async def killed_behind_a_checkpoint(feeder: Feeder, url: str) -> list[Path]:
    """A run whose learner dies after step 5, with a checkpoint of step 3."""
    await feeder.feed(14)
    learner = LearnerProcess.start(config_path(feeder), url, crash_at="marked:4")
    assert await learner.wait() == -signal.SIGKILL, learner.log()
    assert newest_checkpoint(feeder).meta.step == 3
    return list_checkpoints(feeder.config.run_dir / "checkpoints")


async def ends_well(feeder: Feeder, url: str) -> None:
    learner = LearnerProcess.start(config_path(feeder), url)
    assert await learner.wait() == 0, learner.log()
    await check_ledger(feeder, 5 * 120)
    assert newest_checkpoint(feeder).meta.step == 5


async def test_a_journal_that_disagrees_with_redis(feeder: Feeder, any_redis: RedisServer) -> None:
    before = await killed_behind_a_checkpoint(feeder, any_redis.url)
    journal, kept = feeder.config.run_dir / "journal", feeder.config.run_dir / "kept"
    await asyncio.to_thread(shutil.move, journal, kept)
    learner = LearnerProcess.start(config_path(feeder), any_redis.url)
    assert await learner.wait() == JournalError.exit_code
    assert "in Redis but not in the journal" in learner.log()
    assert list_checkpoints(feeder.config.run_dir / "checkpoints") == before
    await asyncio.to_thread(shutil.rmtree, journal)
    await asyncio.to_thread(shutil.move, kept, journal)
    await ends_well(feeder, any_redis.url)


async def test_a_checkpoint_of_another_model(
    feeder: Feeder, any_redis: RedisServer, tmp_path: Path
) -> None:
    before = await killed_behind_a_checkpoint(feeder, any_redis.url)
    tiny_model(tied=False).save_pretrained(tmp_path / "other")  # type: ignore[operator]
    learner = LearnerProcess.start(
        config_path(feeder), any_redis.url, extra=["--model", str(tmp_path / "other")]
    )
    assert await learner.wait() == CheckpointError.exit_code
    assert "no checkpoint can be used" in learner.log()
    assert "of another model: tensors ['lm_head.weight']" in learner.log()
    assert list_checkpoints(feeder.config.run_dir / "checkpoints") == before
    await ends_well(feeder, any_redis.url)


def test_a_world_of_another_size(any_redis: RedisServer, tmp_path: Path, model_dir: Path) -> None:
    path = write_config(tmp_path, "world", model_dir)
    told = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}
    begun = subprocess.run(
        [
            *(sys.executable, "-m", "learner", str(path), "--redis-url", any_redis.url),
            *("--set", "learner.ranks=2"),
        ],
        env=os.environ | told | {LAUNCHER_PID_VARIABLE: str(os.getpid())},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert begun.returncode == ConfigError.exit_code, begun.stderr
    assert "learner.ranks = 2, but 3 ranks were started: start them by `ringasync up`" in (
        begun.stderr
    )
    assert "Traceback" not in begun.stderr
