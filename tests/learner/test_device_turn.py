"""The learner's hand-over of a shared device, on a real broker and with the real backend."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from learner.device_turn import DeviceTurn
from learner.keeper import Keeper
from learner.worker_thread import TorchThread
from ringasync.broker.client import Broker
from ringasync.broker.types import Fence
from ringasync.config.schema import Config
from ringasync.errors import HandoverError
from tests.conftest import CONFIG_HASH, RedisServer

from .kit import tiny_backend

TTL_MS = 60_000


@pytest.fixture
async def run(redis_server: RedisServer, run_name: str) -> AsyncIterator[tuple[Broker, Fence]]:
    """A run with the learner's lock and the session of one worker, "w"."""
    broker = await Broker.connect(redis_server.url, run_name)
    await broker.create_run("", CONFIG_HASH, "rounds")
    fence = await broker.acquire_lock("learner", "test", TTL_MS)
    await broker.open_session("w", "worker", TTL_MS, {"worker": "w"})
    yield broker, fence
    await broker.delete_run()
    await broker.close()


async def device_of(
    run: tuple[Broker, Fence], tmp_path: Path, thread: TorchThread, **schedule: object
) -> tuple[DeviceTurn, Keeper]:
    """The learner's side under these settings."""
    broker, fence = run
    config = Config.model_validate(
        {
            "run": {"name": broker.run, "dir": str(tmp_path)},
            "data": {"tasks": [{"name": "sums", "kind": "mathematics"}]},
            "schedule": {"mode": "rounds", "colocated": True, **schedule},
        }
    )
    keeper = Keeper(broker, fence, TTL_MS)
    await keeper.beat()
    return DeviceTurn(broker, fence, keeper, tiny_backend(), thread, config), keeper


@pytest.fixture
def thread() -> TorchThread:
    return TorchThread(1)


async def test_takes_it_when_the_worker_sleeps_and_gives_it_back(
    run: tuple[Broker, Fence], tmp_path: Path, thread: TorchThread
) -> None:
    device, keeper = await device_of(run, tmp_path, thread)
    await run[0].heartbeat("w", TTL_MS, {"device_turn": 1, "asleep_turn": 1})
    await device.take()
    assert device.is_held
    assert await device.take() == 0.0
    assert str(keeper.status["doing"]).endswith("(has the device)")
    assert (await keeper.beat()).device_turn == 1
    await device.give_back()
    assert (await keeper.beat()).device_turn == 2
    await device.give_back()
    assert (await keeper.beat()).device_turn == 2
    thread.close()


async def test_a_worker_that_does_not_sleep_is_named_at_the_deadline(
    run: tuple[Broker, Fence], tmp_path: Path, thread: TorchThread
) -> None:
    device, _ = await device_of(run, tmp_path, thread, handover_timeout_s=0.1)
    await run[0].heartbeat("w", TTL_MS, {"doing": "loading version 3"})
    with pytest.raises(HandoverError, match=r"owed by w \(loading version 3, heartbeat") as raised:
        await device.take()
    assert "schedule.handover_timeout_s" in str(raised.value)
    assert not device.is_held
    thread.close()


async def test_what_a_predecessor_held_is_given_back(
    run: tuple[Broker, Fence], tmp_path: Path, thread: TorchThread
) -> None:
    await run[0].take_device(run[1], 0)
    device, keeper = await device_of(run, tmp_path, thread)
    await device.give_back()
    assert (await keeper.beat()).device_turn == 2
    thread.close()


async def test_without_the_setting_nothing_is_asked(
    run: tuple[Broker, Fence], tmp_path: Path, thread: TorchThread
) -> None:
    device, keeper = await device_of(run, tmp_path, thread, colocated=False)
    assert await device.take() == 0.0
    assert await device.give_back() == 0.0
    assert (await keeper.beat()).device_turn == 0
    thread.close()
