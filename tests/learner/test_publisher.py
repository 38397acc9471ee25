"""Versions beside the training: a real broker, the real backend, files on a disk that waits."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from learner.publisher import Publication, Publisher
from learner.worker_thread import TorchThread
from ringasync.broker.client import Broker
from ringasync.broker.types import Fence
from ringasync.config.schema import Config
from ringasync.errors import EnvironmentRefusedError, WeightError
from ringasync.records.weights import WeightManifest
from ringasync.weights.file_transport import FileTransport
from ringasync.weights.manifest import load_manifest
from tests.conftest import RedisServer

from .disk_kit import small_files
from .kit import Feeder, LearnerProcess, config_path, tiny_backend, toy_batch, until


class SlowDisk(FileTransport):
    """Hands versions over once the test lets it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.free = asyncio.Event()
        self.began = 0

    async def publish(self, *arguments: Any, **more: Any) -> WeightManifest:
        self.began += 1
        await self.free.wait()
        return await super().publish(*arguments, **more)


class Publishing:
    """A publisher on a tiny backend."""

    def __init__(
        self, run: tuple[Broker, Fence], directory: Path, mode: str = "pipelined", **learner: object
    ) -> None:
        self.broker, fence = run
        config = Config.model_validate(
            {
                "run": {"name": self.broker.run, "dir": str(directory)},
                "data": {"tasks": [{"name": "sums", "kind": "mathematics"}]},
                "schedule": {"mode": mode},
                "learner": learner,
            }
        )
        self.folder = config.run_dir / "weights"
        self.disk = SlowDisk(self.folder)
        self.backend, self.thread = tiny_backend(), TorchThread(1)
        self.publisher = Publisher(self.broker, fence, self.disk, self.backend, self.thread, config)

    async def begin(self, step: int) -> int:
        return await self.publisher.begin(Publication(step, 0, toy_batch()))

    async def announced(self) -> int:
        return int((await self.broker.run_meta())["latest_version"])

    async def weights_of(self, version: int) -> dict[str, Tensor]:
        """What lies in the announced version's folder."""
        latest = await self.broker.version()
        assert latest is not None
        assert latest.version == version
        return tensors_in(self.folder / load_manifest(latest.manifest).location)


def exported(publishing: Publishing, folder: Path) -> dict[str, Tensor]:
    """The backend's weights of this moment, as they are published."""
    folder.mkdir()
    publishing.backend.save_hf(folder)
    return tensors_in(folder)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(folder / "model.safetensors")
    return found


async def test_training_goes_on_while_a_version_is_handed_over(
    run: tuple[Broker, Fence], tmp_path: Path
) -> None:
    one = Publishing(run, tmp_path)
    written = exported(one, tmp_path / "before")
    assert await one.begin(0) == 1
    one.backend.train_batch(toy_batch(step=1))  # not of this version any more
    assert await one.announced() == 0
    one.publisher.check()  # it goes on
    second = asyncio.create_task(one.begin(1))
    assert not (await asyncio.wait({second}, timeout=0.05))[0]
    assert one.disk.began == 1
    one.disk.free.set()
    assert await second == 2
    await one.publisher.settle()
    assert one.publisher.announce_s > 0.0
    assert await one.announced() == 2
    trained = exported(one, tmp_path / "after")
    found = await one.weights_of(2)
    assert all(torch.equal(found[name], value) for name, value in trained.items())
    first = tensors_in(one.folder / "v000001-f1")
    assert all(torch.equal(first[name], value) for name, value in written.items())
    assert not all(torch.equal(first[name], found[name]) for name in found)
    one.thread.close()


async def test_training_goes_on_while_a_version_is_written(
    run: tuple[Broker, Fence], tmp_path: Path
) -> None:
    one = Publishing(run, tmp_path)
    one.disk.free.set()
    before = exported(one, tmp_path / "before")
    may_write = threading.Event()
    one.backend._exporter._executor.submit(may_write.wait)  # the disk is busy
    assert await one.begin(0) == 1
    one.backend.train_batch(toy_batch(step=1))
    assert one.disk.began == 0
    may_write.set()
    await one.publisher.settle()
    assert await one.announced() == 1
    found = await one.weights_of(1)
    assert all(torch.equal(found[name], value) for name, value in before.items())
    one.thread.close()


async def test_a_disk_that_refuses_a_version_is_told_when_it_is_settled(
    run: tuple[Broker, Fence], tmp_path: Path
) -> None:
    one = Publishing(run, tmp_path)
    one.disk.free.set()
    with small_files(5000):
        await one.begin(0)
        with pytest.raises(EnvironmentRefusedError, match="weights cannot be written to"):
            await one.publisher.settle()
    assert await one.announced() == 0
    assert one.disk.began == 0
    assert await one.begin(0) == 2
    await one.publisher.settle()
    assert await one.announced() == 2
    one.thread.close()


@pytest.mark.parametrize(
    ("mode", "learner"), [("rounds", {}), ("pipelined", {"publish_async": False})]
)
async def test_it_is_announced_when_begin_returns(
    run: tuple[Broker, Fence], tmp_path: Path, mode: str, learner: dict[str, object]
) -> None:
    one = Publishing(run, tmp_path, mode, **learner)
    begun = asyncio.create_task(one.begin(0))
    await until(lambda: _true(one.disk.began), "the hand-over to begin")
    assert not begun.done()
    one.disk.free.set()
    assert await begun == 1
    assert await one.announced() == 1
    one.thread.close()


async def test_what_ends_a_hand_over_is_raised_once(
    run: tuple[Broker, Fence], tmp_path: Path
) -> None:
    one = Publishing(run, tmp_path)
    one.disk.free.set()
    await run[0].client.hset(run[0].keys.meta, "publication_blocked", "two workers refused it")
    await one.begin(0)
    with pytest.raises(WeightError, match="two workers refused it"):
        await one.publisher.settle()
    one.publisher.check()
    assert await one.announced() == 0
    one.thread.close()


async def test_a_hand_over_is_given_up_with_the_learner(
    run: tuple[Broker, Fence], tmp_path: Path
) -> None:
    one = Publishing(run, tmp_path)
    await one.begin(0)
    await until(lambda: _true(one.disk.began), "the hand-over to begin")
    await one.publisher.close()
    assert await one.announced() == 0
    await one.publisher.close()
    one.thread.close()


async def test_a_learner_that_waits_for_tokens_ends_by_it(
    feeder: Feeder, any_redis: RedisServer
) -> None:
    broker = feeder.broker
    await broker.client.hset(broker.keys.meta, "publication_blocked", "two workers refused it")
    learner = LearnerProcess.start(config_path(feeder), any_redis.url)
    assert await learner.wait() == WeightError.exit_code, learner.log()
    assert "publication is blocked: two workers refused it" in learner.log()


async def _true(value: object) -> bool:
    return bool(value)
