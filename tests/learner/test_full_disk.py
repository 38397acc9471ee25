"""A disk that fills up while a learner trains: said with path and bytes, nothing lost, resumed."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path

import pytest

from ringasync.errors import CheckpointError, EnvironmentRefusedError, JournalError

from ..conftest import RedisServer
from .checkpoint_kit import newest_checkpoint
from .disk_kit import small_disk, small_files
from .kit import Feeder, LearnerProcess, check_ledger, config_path, tiny_backend, tiny_model, until

CASES = {
    "journal": (JournalError.exit_code, "JournalError: cannot write the journal in "),
    "checkpoints": (CheckpointError.exit_code, "checkpoint not written; training goes on"),
    "publish": (
        EnvironmentRefusedError.exit_code,
        "EnvironmentRefusedError: weights cannot be written to ",
    ),
    "weights": (EnvironmentRefusedError.exit_code, "EnvironmentRefusedError: version "),
}


def fill(folder: Path) -> Path:
    """A file that leaves no byte free beside it."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 12)):
                pass
        except OSError:
            return ballast
    raise AssertionError("not full")


@pytest.mark.parametrize("what", CASES)
async def test_a_disk_that_fills_up_costs_nothing(
    what: str, feeder: Feeder, any_redis: RedisServer
) -> None:
    run_dir = feeder.config.run_dir
    folder = run_dir / what
    code, said = CASES[what]
    with small_disk(folder):
        await feeder.feed(8)
        learner = LearnerProcess.start(config_path(feeder), any_redis.url)
        await feeder.published(4)

        async def saved() -> bool:
            return any((run_dir / "checkpoints").glob("step00000003-*"))

        await until(saved, "the checkpoint of step 3")
        before = {row["step"]: row["loss"] for row in await feeder.metrics()}
        ballast = await asyncio.to_thread(fill, folder)
        whole = {path.name for path in (run_dir / "weights").glob("v*-f*[0-9]")}
        await feeder.feed(6)
        assert await learner.wait() == code, learner.log()
        log = learner.log()
        assert said in log
        assert str(folder) in log
        assert re.search(r"\([1-9]\d* bytes needed, 0 free\)", log), log
        assert "No space left on device" in log or "StorageFull" in log, log
        assert "Traceback" not in log
        assert newest_checkpoint(feeder).meta.step == 3
        if what != "checkpoints":  # there training went on to its end
            after = {path.name for path in (run_dir / "weights").glob("v*-f*[0-9]")}
            assert after == whole, "a version looks whole"
        assert not [path for path in folder.iterdir() if path.name.startswith(".tmp")]
        ballast.unlink()
        again = LearnerProcess.start(config_path(feeder), any_redis.url)
        assert await again.wait() == 0, again.log()
        assert newest_checkpoint(feeder).meta.step == 5
        await check_ledger(feeder, 5 * 120)
        rows = {row["step"]: row["loss"] for row in await feeder.metrics()}
        assert rows.keys() == {1, 2, 3, 4, 5}
        assert rows | before == rows
        latest = await feeder.broker.version()
        assert latest is not None
        assert latest.learner_step == 5


def test_weights_that_do_not_fit_are_refused_with_path_and_bytes(tmp_path: Path) -> None:
    backend = tiny_backend()
    with small_files(5000), pytest.raises(EnvironmentRefusedError) as raised:
        backend.save_hf(tmp_path)
    size = sum(one.numel() * one.element_size() for one in tiny_model().parameters())
    free = os.statvfs(tmp_path)
    assert f"weights cannot be written to {tmp_path}: " in str(raised.value)
    found = re.search(r"\((\d+) bytes needed, (\d+) free\)", str(raised.value))
    assert found is not None
    assert int(found[1]) == size
    assert int(found[2]) == pytest.approx(free.f_bavail * free.f_frsize, rel=0.2)
    backend.save_hf(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
