"""Checkpoints beside the training: a real broker, the real backend, real full disks."""

from __future__ import annotations

import asyncio
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import structlog
import torch

from learner.backends.torch_backend import TorchBackend
from learner.checkpoint import list_checkpoints
from learner.checkpointer import Checkpointer
from learner.state import LearnerState
from learner.worker_thread import TorchThread
from ringasync.broker.client import Broker
from ringasync.broker.types import Fence
from ringasync.config.schema import Config
from ringasync.errors import CheckpointError, FencedError
from tests.conftest import RedisServer

from .checkpoint_kit import load_checkpoint, newest_checkpoint, snapshot
from .disk_kit import small_files
from .kit import Feeder, LearnerProcess, check_ledger, config_path, tiny_backend, toy_batch, until

TTL_MS = 60_000


class Saving:
    """A checkpointer on a tiny backend, and the metas of its run."""

    def __init__(self, broker: Broker, fence: Fence, directory: Path, **learner: object) -> None:
        self.config = Config.model_validate(
            {
                "run": {"name": broker.run, "dir": str(directory)},
                "data": {"tasks": [{"name": "sums", "kind": "mathematics"}]},
                "learner": learner,
            }
        )
        self.backend: TorchBackend = tiny_backend()
        self.thread = TorchThread(1)
        self.directory = self.config.run_dir / "checkpoints"
        self.saver = Checkpointer(broker, fence, self.backend, self.thread, self.config, -1)

    def state(self, step: int) -> LearnerState:
        return LearnerState(step=step, journal_offset=100 * step)

    async def begin(self, step: int) -> float:
        return await self.saver.begin(self.state(step).meta(self.config.run.name, 1, 1), ())

    async def finish(self, step: int) -> None:
        await self.saver.finish(self.state(step).meta(self.config.run.name, 1, 1), ())

    def steps(self) -> list[int]:
        return [int(path.name[4:12]) for path in list_checkpoints(self.directory)]

    @contextmanager
    def slow_disk(self) -> Iterator[threading.Event]:
        """The thread that writes is busy until the event is set."""
        gate = threading.Event()
        self.backend._saver._executor.submit(gate.wait)
        try:
            yield gate
        finally:
            gate.set()


async def test_training_goes_on_while_the_disk_is_slow(
    run: tuple[Broker, Fence], tmp_path: Path
) -> None:
    saving = Saving(*run, tmp_path)
    saving.backend.train_batch(toy_batch())
    staged = snapshot(saving.backend)
    with saving.slow_disk() as gate:
        await saving.begin(1)
        saving.backend.train_batch(toy_batch(step=1))  # not of this checkpoint any more
        assert (saving.steps(), saving.saver.written_step) == ([], -1)
        assert await saving.begin(1) == 0.0  # under way
        with structlog.testing.capture_logs() as logs:
            second = asyncio.create_task(saving.begin(2))

            async def waits() -> bool:
                return any("still being written" in log["event"] for log in logs)

            await until(waits, "the second checkpoint to say that it waits")
            assert not second.done()
            gate.set()
            assert await second > 0.0
    await saving.saver.settle()
    assert saving.steps() == [2, 1]
    assert saving.saver.written_step == 2
    assert all(not name.startswith(".tmp-") for name in names_in(saving.directory))
    list_checkpoints(saving.directory)[0].rename(tmp_path / "newer")
    first, _ = load_checkpoint(saving.directory, saving.config.run.name)
    assert first is not None
    assert (first.meta.step, first.meta.journal_offset) == (1, 100)
    assert all(torch.equal(first.tensors[name], staged[name]) for name in staged)


async def test_without_the_setting_it_is_written_when_begin_returns(
    run: tuple[Broker, Fence], tmp_path: Path
) -> None:
    saving = Saving(*run, tmp_path, checkpoint_async=False)
    assert await saving.begin(1) > 0.0
    assert (saving.steps(), saving.saver.written_step) == ([1], 1)
    await saving.finish(1)  # is there already
    assert saving.steps() == [1]


async def test_a_device_may_be_left_while_the_disk_is_slow(
    run: tuple[Broker, Fence], tmp_path: Path
) -> None:
    saving = Saving(*run, tmp_path)
    saving.backend.train_batch(toy_batch())
    staged = snapshot(saving.backend)
    with saving.slow_disk():
        await saving.begin(1)
        saving.backend.offload()
        saving.backend.onload()
        saving.backend.train_batch(toy_batch(step=1))
    await saving.saver.settle()
    found, _ = load_checkpoint(saving.directory, saving.config.run.name)
    assert found is not None
    assert all(torch.equal(found.tensors[name], staged[name]) for name in staged)


async def test_a_failed_write_keeps_the_last_good_one_and_is_tried_again(
    run: tuple[Broker, Fence], tmp_path: Path
) -> None:
    saving = Saving(*run, tmp_path)
    await saving.begin(1)
    await saving.saver.settle()
    with small_files(2000), structlog.testing.capture_logs() as logs:
        await saving.begin(2)
        await saving.saver.settle()
    (said,) = (log for log in logs if log["log_level"] == "error")
    assert (said["step"], said["last_good_step"]) == (2, 1)
    assert (saving.saver.failures, saving.saver.written_step, saving.steps()) == (1, 1, [1])
    assert all(not name.startswith(".tmp-") for name in names_in(saving.directory))
    await saving.finish(2)
    assert (saving.saver.written_step, saving.saver.last_failure) == (2, None)


async def test_an_end_without_its_checkpoint_is_an_error(
    run: tuple[Broker, Fence], tmp_path: Path
) -> None:
    saving = Saving(*run, tmp_path)
    saving.config.run_dir.mkdir(parents=True)
    saving.directory.touch()  # a file where the folder should be
    await saving.begin(3)
    assert saving.saver.failures == 1
    with pytest.raises(CheckpointError, match=r"of step 3.*the journal holds every batch"):
        await saving.finish(3)


async def test_who_lost_the_lock_names_no_checkpoint(
    run: tuple[Broker, Fence], tmp_path: Path
) -> None:
    broker, fence = run
    saving = Saving(broker, fence, tmp_path)
    with saving.slow_disk():
        await saving.begin(1)
        await broker.release_lock(fence)
        await broker.acquire_lock("learner", "a rival", TTL_MS)
    with pytest.raises(FencedError):
        await saving.saver.settle()
    assert names_in(saving.directory) == []


async def test_an_end_by_an_error_waits_for_the_write(
    run: tuple[Broker, Fence], tmp_path: Path
) -> None:
    saving = Saving(*run, tmp_path)
    with saving.slow_disk() as gate:
        await saving.begin(1)
        waiting = asyncio.create_task(saving.saver.settle())
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # it begins to wait
        waiting.cancel()  # as the loop is when its keeper fails
        closing = asyncio.create_task(saving.saver.close())
        gate.set()
        await closing
    assert waiting.cancelled()
    assert [name[:12] for name in names_in(saving.directory)] == ["step00000001"]


def mount(folder: Path, options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    subprocess.run(command, capture_output=True, check=True)


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@pytest.fixture
def small_disk(feeder: Feeder) -> Iterator[Path]:
    """The checkpoints' folder on a file system that is too small for any."""
    folder = feeder.config.run_dir / "checkpoints"
    folder.mkdir(parents=True)
    try:
        mount(folder, "size=64k")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"file systems cannot be mounted here: {error}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


async def test_a_full_disk_ends_no_run_before_its_last_step(
    feeder: Feeder, any_redis: RedisServer, small_disk: Path
) -> None:
    await feeder.feed(14)
    full = LearnerProcess.start(config_path(feeder), any_redis.url)
    assert await full.wait() == CheckpointError.exit_code, full.log()
    assert "checkpoint not written" in full.log()
    assert "No space left" in full.log()
    await check_ledger(feeder, 5 * 120)  # all five steps are trained and published
    latest = await feeder.broker.version()
    assert latest is not None
    assert latest.learner_step == 5
    assert (await feeder.metrics())[-1]["checkpoints_failed"] >= 1
    assert names_in(small_disk) == []
    await asyncio.to_thread(mount, small_disk, "remount,size=64m")
    again = LearnerProcess.start(config_path(feeder), any_redis.url)
    assert await again.wait() == 0, again.log()
    assert newest_checkpoint(feeder).meta.step == 5
    await check_ledger(feeder, 5 * 120)
    rows = await feeder.metrics()
    assert {row["step"]: row["loss"] for row in rows[:5]} == {
        row["step"]: row["loss"] for row in rows[5:]
    }
