"""A learner on two "nodes": two launchers, as on two machines, that meet over loopback."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from torch._C._distributed_c10d import TCPStore

from learner import nodes as nodes_module
from learner.nodes import Ending, Nodes, NodeWatch
from ringasync.errors import ConfigError
from tests.redis_process import free_port

from ..conftest import RedisServer
from .checkpoint_kit import newest_checkpoint
from .kit import Feeder, config_path, until
from .ranked_learner import RankedLearner, finished_alone, losses_alone, trained

pytestmark = pytest.mark.timeout(300)

PLACE = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_RDZV_ENDPOINT": "learner-0.learner"}


async def test_two_nodes_train_die_together_and_go_on_where_they_were(
    feeder: Feeder,
    any_redis: RedisServer,
    tmp_path: Path,
    model_dir: Path,
    started: list[RankedLearner],
) -> None:
    expected = await losses_alone(any_redis.url, tmp_path, model_dir, 14)

    async def begin(step: int) -> list[RankedLearner]:
        port = free_port()
        both = [
            RankedLearner(config_path(feeder), any_redis.url, node=node, port=port)
            for node in (1, 0)
        ][::-1]
        started.extend(both)
        await trained(feeder, both, step)
        return both

    async def ended(both: list[RankedLearner]) -> list[int]:
        return list(await asyncio.gather(*(one.ended() for one in both)))

    await feeder.feed(3)
    both = await begin(1)
    [victim] = both[1].ranks
    victim.kill()
    assert await ended(both) == [1, 1]
    said = f"learner rank 1 (pid {victim.pid}) on node 1 ended: killed by SIGKILL; it went first"
    for one in both:
        assert said in one.log(), one.log()
        assert "rank 0" in one.log().partition(said)[0], "the other node's ending is told too"

    await feeder.feed(3)
    both = await begin(2)
    both[0].launcher.kill()  # the node that keeps the store
    assert await ended(both) == [-signal.SIGKILL, 1]
    assert "learner node 0 does not answer any more" in both[1].log(), both[1].log()

    await feeder.feed(3)
    both = await begin(3)
    os.kill(both[1].process.pid, signal.SIGTERM)  # the node without rank 0
    assert await ended(both) == [0, 0], both[0].log() + both[1].log()
    assert newest_checkpoint(feeder).meta.step == await feeder.step()
    first = {row["step"] for row in await feeder.metrics()}

    await feeder.feed(5)
    rows = await finished_alone(feeder, any_redis.url, expected)
    assert expected.keys() > first
    for row in rows:
        assert ("2 ranks" in row["arithmetic"]) == (row["step"] in first)


async def test_a_node_that_waits_for_others_can_be_stopped(
    feeder: Feeder, any_redis: RedisServer, started: list[RankedLearner]
) -> None:
    port = free_port()
    waiting = RankedLearner(config_path(feeder), any_redis.url, node=0, port=port)
    started.append(waiting)

    async def listens() -> bool:
        assert waiting.process.poll() is None, waiting.log()
        return any(one.laddr.port == port for one in waiting.launcher.net_connections())

    await until(listens, "the store of node 0", 60)
    os.kill(waiting.process.pid, signal.SIGTERM)
    assert await waiting.ended() == 0, waiting.log()


def test_the_place_of_a_node_comes_from_the_variables_of_torchrun() -> None:
    assert Nodes.of({}) == Nodes.of({"PET_NNODES": "1"}) == Nodes()
    assert Nodes.of(PLACE) == Nodes(2, 1, "learner-0.learner", 29400)
    assert Nodes.of(PLACE | {"PET_RDZV_ENDPOINT": "[fd00::1]:5"}).endpoint == "[fd00::1]:5"
    assert Nodes.of(PLACE).ranks_here(8) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"PET_NNODES": "1:4"}, r"PET_NNODES = '1:4' must be a number from 1 to 65535"),
        ({"PET_NODE_RANK": "2"}, r"PET_NODE_RANK = '2' must be a number from 0 to 1"),
        ({"PET_NODE_RANK": ""}, r"PET_NODE_RANK = '' must be"),
        ({"PET_RDZV_ENDPOINT": ""}, r"PET_RDZV_ENDPOINT = '': set it to HOST:PORT"),
        ({"PET_RDZV_ENDPOINT": "here:99999"}, r"PET_RDZV_ENDPOINT: The port number"),
    ],
)
def test_a_bad_place_is_refused(change: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Nodes.of(PLACE | change)


async def test_ranks_that_cannot_be_dealt_out_are_refused(
    feeder: Feeder, any_redis: RedisServer, started: list[RankedLearner]
) -> None:
    extra = ("--set", "learner.ranks=1")
    learner = RankedLearner(config_path(feeder), any_redis.url, *extra, node=0, port=1)
    started.append(learner)
    assert await asyncio.to_thread(learner.process.wait, 60) == ConfigError.exit_code
    assert "learner.ranks = 1 cannot be dealt out evenly to 2 nodes" in learner.log()


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Nodes:
    """Node 0's; nodes are given up soon."""
    monkeypatch.setattr(nodes_module, "SILENT_S", 1.0)
    return Nodes(2, 0, "127.0.0.1", free_port())


@pytest.fixture
def watches() -> Iterator[Callable[[Nodes], NodeWatch]]:
    """Makes launchers' talks; all of them end, so that no thread of theirs outlives the test."""
    made: list[NodeWatch] = []

    def make(nodes: Nodes) -> NodeWatch:
        made.append(NodeWatch(nodes))
        return made[-1]

    yield make
    # Node 0 keeps the store, so it is the last.
    assert all([watch.close() for watch in reversed(made)])


async def test_a_machine_that_falls_silent_is_found_out(
    place: Nodes, watches: Callable[[Nodes], NodeWatch]
) -> None:
    """Nothing closes its connections, so no rank that waits for one of its ranks would notice."""
    watch = watches(place)
    other = TCPStore(
        place.host, place.port, is_master=False, wait_for_workers=False, timeout=timedelta(20)
    )

    async def beats_are_heard() -> bool:
        other.add("launchers/beat/1", 1)
        return bool(watch._beats)

    await until(beats_are_heard, "the beats of node 1")
    assert not watch.has_lost_some()
    began_s = time.monotonic()

    async def is_lost() -> bool:
        return watch.silent() == [1]

    await until(is_lost, "the loss of node 1")
    assert time.monotonic() - began_s > 0.5
    assert watch.exchange(Ending({0: 1}, [0]), 0.5) == [1]


async def test_endings_reach_the_other_node_whole(
    place: Nodes, watches: Callable[[Nodes], NodeWatch]
) -> None:
    first, second = watches(place), watches(Nodes(2, 1, place.host, place.port))
    told = Ending({1: 7}, [1], {1: "StepMemoryError: too long"}, {1: 4711})
    untold = await asyncio.gather(
        asyncio.to_thread(first.exchange, Ending({0: 1}, [0]), 20),
        asyncio.to_thread(second.exchange, told, 20),
    )
    assert not any(untold)
    assert first.endings == {1: told}
    assert second.endings == {0: Ending({0: 1}, [0])}
    second.ask_stop()
    assert await asyncio.to_thread(first.stop_asked.wait, 20)
