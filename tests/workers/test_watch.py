"""A worker that generates nothing, a swap and a fetch that stick: named in its session."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from workers.engines.base import SamplingParams
from workers.engines.scripted import ScriptedEngine
from workers.watch import WorkerWatch

from .world import RunningWorker, World, until

MakeWorld = Callable[..., Coroutine[Any, Any, World]]
DEADLINE_S = 0.3

IDLE = {
    **{"doing": "waiting for work", "active": 0, "tokens_generated": 5, "swaps": 0},
    **{"fetching_version": 0, "stall": ""},
}
BUSY = {**IDLE, "doing": "generating", "active": 3}


def overdue(*statuses: dict[str, Any]) -> str:
    """What a watch says that sees each of these statuses for 40 s; its deadline is 30 s."""
    now_s = 0.0
    watch = WorkerWatch(30, lambda: now_s)
    said = ""
    for status in statuses:
        said = watch.look(status)
        now_s += 40
    return watch.look(statuses[-1]) if len(statuses) == 1 else said


@pytest.mark.parametrize(
    ("status", "named"),
    [
        (BUSY, "tokens of 3 active rollouts: this worker generates nothing; owed by the inference"),
        ({**IDLE, "doing": "taking up version 7 (engine paused: weights)"}, "a weight swap (takin"),
        ({**IDLE, "doing": "loading version 1"}, "a weight swap (loading version 1); owed by"),
        ({**BUSY, "tokens_generated": 9, "fetching_version": 8}, "the files of version 8; owed by"),
        ({**IDLE, "stall": "31 s: a verdict"}, "31 s: a verdict"),
    ],
)
def test_what_does_not_get_on_is_named(status: dict[str, Any], named: str) -> None:
    assert named in overdue(status)


@pytest.mark.parametrize(
    "statuses",
    [
        (IDLE, IDLE),
        (BUSY, {**BUSY, "tokens_generated": 6}),
        (BUSY, {**BUSY, "doing": "generating (engine paused: run paused)"}),
        ({**BUSY, "doing": "asleep: the learner has the device"},) * 2,
        ({**IDLE, "fetching_version": 7}, {**IDLE, "fetching_version": 8}),
        ({**IDLE, "doing": "taking up version 7"}, {**IDLE, "doing": "taking up version 8"}),
    ],
)
def test_what_gets_on_or_has_nothing_to_do_is_not(statuses: tuple[dict[str, Any], ...]) -> None:
    assert overdue(*statuses) == ""


class StuckSwapEngine(ScriptedEngine):
    """Takes the first weights and never ends to take up the second, until it is let."""

    def __init__(self, sampling: SamplingParams) -> None:
        super().__init__(sampling, step_interval_s=0.001)
        self.let = asyncio.Event()

    async def load_weights(self, weights_dir: Path, policy_version: int) -> None:
        await self.let.wait()
        await super().load_weights(weights_dir, policy_version)


async def watched_world(make_world: MakeWorld) -> World:
    world = await make_world()
    shorter = world.config.observability.model_copy(update={"stall_report_s": DEADLINE_S})
    world.config = world.config.model_copy(update={"observability": shorter})
    await world.publish(1)
    return world


async def stall_of(running: RunningWorker) -> str:
    """As ``top`` reads it: out of Redis."""
    rows = await running.broker.sessions()
    return next((row.get("stall", "") for row in rows if row["role"] == "worker"), "")


async def test_an_engine_that_generates_nothing_is_named_in_top(make_world: MakeWorld) -> None:
    world = await watched_world(make_world)
    silent = await world.start("w", lambda sampling: ScriptedEngine(sampling, step_interval_s=None))
    await world.feed("g1")

    async def named() -> bool:
        return "tokens of 2 active rollouts" in await stall_of(silent)

    await until(named, "the worker to be named")


async def test_a_stuck_swap_is_named_in_top_until_it_is_over(make_world: MakeWorld) -> None:
    world = await watched_world(make_world)
    running = await world.start("w", StuckSwapEngine)
    await until(lambda: running.worker.weights.loaded_number == 1, "version 1")
    await world.publish(2)

    async def named() -> bool:
        return "a weight swap (taking up version 2" in await stall_of(running)

    await until(named, "the swap to be named")
    running.engine.let.set()

    async def over() -> bool:
        return await stall_of(running) == ""

    await until(over, "the stall to be taken back")
    assert running.worker.weights.loaded_number == 2
