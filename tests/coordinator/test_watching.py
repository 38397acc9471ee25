"""Evaluations that run out of time, stall reports, the pinned version, the empty Redis."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from ringasync.broker.client import Broker
from ringasync.broker.types import Backlog, Poll
from ringasync.config.schema import Config
from ringasync.coordinator.app import Coordinator, Place
from ringasync.coordinator.evaluation import Evaluator
from ringasync.coordinator.history import eval_group_id
from ringasync.coordinator.recorder import Recorder
from ringasync.coordinator.seat import Seat
from ringasync.coordinator.watchdog import Situation, judge
from ringasync.runtime.shutdown import Shutdown
from tests.coordinator.crew import (
    Crew,
    assert_each_entry_once,
    make_config,
    metrics,
    until,
    words_source,
)

POLL = Poll(True, "running", False, 1, None, (), 0, "none", 1, 0)
BACKLOG = Backlog(**{f.name: 0 for f in dataclasses.fields(Backlog)} | {"paused_feeding": ""})  # type: ignore[arg-type]
NOW = Situation(POLL, BACKLOG, {}, 100, "", False, "full: open groups hold 9 of 9 tokens")
WORKER = {
    "role": "worker",
    "worker": "w1",
    "doing": "loading weights",
    "leases": "3",
    "age_ms": "70",
}
LEARNER = {"role": "learner", "worker": "learner", "doing": "training", "age_ms": "4000"}


def situation(**change: object) -> Situation:
    """``NOW`` with fields of the poll, the backlog or itself changed."""
    parts: dict[str, dict[str, object]] = {"poll": {}, "backlog": {}, "self": {}}
    for name, value in change.items():
        if name in Poll.__slots__:
            parts["poll"][name] = value
        elif name in Backlog.__slots__:
            parts["backlog"][name] = value
        else:
            parts["self"][name] = value
    return dataclasses.replace(
        NOW,
        poll=dataclasses.replace(POLL, **parts["poll"]),  # type: ignore[arg-type]
        backlog=dataclasses.replace(BACKLOG, **parts["backlog"]),  # type: ignore[arg-type]
        **parts["self"],  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("now", "awaited", "owed_by"),
    [
        (situation(paused=True), "resumed", "ringasync resume"),
        (situation(paused_feeding="40 of 64 bad"), "40 of 64 bad", "ringasync resume"),
        (situation(publication_blocked="2 refused 7"), "2 refused 7", "`ringasync resume`"),
        (situation(redis_full=True), "memory in Redis", "maxmemory"),
        (situation(latest_version=0), "first policy version", "learner (training"),
        (situation(ready_tokens=100), "a step on 100 waiting tokens", "heartbeat 4000 ms ago"),
        (situation(round_state="training", round_id=4), "round 4 to be trained", "learner"),
        (situation(grading_jobs=2), "verdicts on 2", "w1 (loading weights, 3 leases"),
        (situation(running_rollouts=3), "tokens of 3 leased rollouts", "w1"),
        (situation(eval_open=5, evaluation="last"), "5 held-out rollouts (last)", "w1"),
        (situation(open_rollouts=7), "7 rollouts to be taken", "w1"),
        (situation(), "the coordinator's next turn (full: open", "the coordinator"),
    ],
)
def test_a_stall_names_what_is_awaited_and_who_owes_it(
    now: Situation, awaited: str, owed_by: str
) -> None:
    stall = judge(now, [WORKER, LEARNER])
    assert awaited in stall.awaited
    assert owed_by in stall.owed_by


def test_a_stall_on_a_shared_device_names_who_is_on_it() -> None:
    training = situation(round_state="training", round_id=4, device_turn=7)
    other = {**WORKER, "worker": "w2", "asleep_turn": "7"}
    stall = judge(training, [{**WORKER, "asleep_turn": "5"}, other, LEARNER])
    assert "the device for the learner (turn 7)" in stall.awaited
    assert "w1" in stall.owed_by
    assert "w2" not in stall.owed_by
    stall = judge(training, [other, LEARNER])
    assert "the learner to hand the device back" in stall.awaited
    assert stall.owed_by.startswith("learner (training")
    stall = judge(situation(round_state="open", device_turn=8), [other, WORKER, LEARNER])
    assert "to wake" in stall.awaited
    assert stall.owed_by.startswith("w2")


def test_a_role_that_is_not_there_is_named_as_missing() -> None:
    assert judge(situation(open_rollouts=7), [LEARNER]).owed_by == "nobody: no worker has a session"
    many = [{**WORKER, "worker": f"w{i}", "age_ms": str(i)} for i in range(6)]
    described = judge(situation(open_rollouts=7), many).owed_by
    assert described.startswith("w5 ")  # the longest silent first
    assert described.endswith("and 2 more")


def test_a_worker_that_keeps_tokens_says_that_redis_is_full() -> None:
    full = {**WORKER, "doing": "waiting: Redis is full"}
    assert judge(situation(running_rollouts=3), [full, LEARNER]).awaited == "memory in Redis"


@asynccontextmanager
async def coordinating(config: Config, url: str) -> AsyncIterator[asyncio.Task[int]]:
    """A coordinator in this process, stopped at the end if it has not ended."""
    shutdown = Shutdown()
    place = Place(url, "none")
    running = asyncio.create_task(Coordinator(config, place, shutdown, source=words_source).run())
    try:
        yield running
    finally:
        shutdown.request("test ends")
        await asyncio.wait_for(asyncio.gather(running, return_exceptions=True), 20)


async def test_nothing_moves_is_said_in_the_log_and_in_top(
    config: Config, redis_url: str, live: Broker
) -> None:
    async with coordinating(config, redis_url):
        crew = Crew(live, config)
        await crew.join()  # a version is there; the worker keeps silent

        async def shown() -> str:
            rows = await live.sessions()
            return "".join(row.get("stall", "") for row in rows if row["role"] == "coordinator")

        async def stalled() -> bool:
            await crew.beat()
            return "held-out rollouts" in await shown()

        await until(stalled, "the stall report")
        assert "crew (generating, 0 leases" in await shown()
        await crew.generate()

        async def moved() -> bool:
            return await shown() == ""

        await until(moved, "the report to go once something moves")


async def test_training_prompts_wait_only_until_the_evaluation_is_fed(
    config: Config, redis_url: str, live: Broker
) -> None:
    async with coordinating(config, redis_url):
        await until(lambda: (config.run_dir / "metrics.jsonl").exists(), "the start")
        assert (await live.backlog()).open_groups == 0  # no version yet: nothing is fed
        crew = Crew(live, config)
        await crew.join()

        async def both_are_fed() -> bool:
            backlog = await live.backlog()
            return backlog.eval_open == 8 and backlog.open_groups > 0

        await until(both_are_fed, "training prompts beside the unfinished evaluation")
        assert (await live.run_meta())["pin_version"] == "1"


async def test_an_evaluation_out_of_time_is_recorded_without_what_is_missing(
    tmp_path: Path, run_name: str, redis_url: str, live: Broker
) -> None:
    config = make_config(tmp_path, run_name, eval__timeout_s=1.0)
    async with coordinating(config, redis_url) as running:
        crew = Crew(live, config)
        await crew.join()
        await until(lambda: _eval_open(live, 8), "the held-out prompts")
        await crew.beat()
        await crew.generate(3)  # three of eight, then nothing for longer than the timeout
        await crew.grade()
        await until(lambda: _eval_open(live, 0), "the end of the evaluation")
        working = asyncio.create_task(crew.work())
        assert await asyncio.wait_for(running, 60) == 0
        await working
    lines = metrics(config)
    assert_each_entry_once(lines)
    first = next(line for line in lines if line["kind"] == "eval" and line["label"] == "first")
    assert (first["n"], first["without_verdict"]) == (3, 5)
    assert (await live.audit()).balanced
    assert (await live.run_meta())["paused_feeding"] == ""


@pytest.fixture
async def evaluating(
    tmp_path: Path, run_name: str, live: Broker
) -> AsyncIterator[tuple[Seat, Evaluator, Recorder]]:
    """The first evaluation has been fed, and Redis has then lost every group of it but one."""
    config = make_config(tmp_path, run_name, eval__timeout_s=30)
    await live.create_run("", "hash", "pipelined")
    seat = Seat(live, config, Shutdown())
    assert await seat.take()
    await Crew(live, config).join()
    recorder = Recorder(seat)
    recorder.open()
    evaluator = Evaluator(seat, words_source(config), recorder)
    await evaluator.turn(await seat.beat(), BACKLOG, training_is_over=False)
    assert (evaluator.running, evaluator.missing) == ("first", 8)
    keys = live.keys
    for name in (eval_group_id("first", index) for index in range(1, 8)):
        await live.client.delete(keys.group(name), keys.rollout(f"{name}.0"))
        await live.client.srem(keys.live, name)
    await live.client.hset(keys.meta, "pin_version", "")
    yield seat, evaluator, recorder
    recorder.close()


async def test_held_out_prompts_that_redis_lost_are_fed_again(
    evaluating: tuple[Seat, Evaluator, Recorder], live: Broker
) -> None:
    seat, evaluator, _ = evaluating
    seat.incarnations += 1  # what `keep` does when Redis is another process
    await evaluator.turn(await seat.beat(), BACKLOG, training_is_over=False)
    for index in range(8):
        group = await live.group(eval_group_id("first", index))
        assert group is not None
        assert group["state"] == "open"
    assert (await seat.beat()).pin_version == 1
    assert (evaluator.running, evaluator.missing) == ("first", 8)


async def test_out_of_time_with_groups_that_redis_lost(
    evaluating: tuple[Seat, Evaluator, Recorder],
) -> None:
    seat, evaluator, recorder = evaluating
    evaluator._deadline_s = 0.0
    await evaluator.turn(await seat.beat(), BACKLOG, training_is_over=False)
    line = recorder.history.evals["first"]
    assert (line["n"], line["without_verdict"]) == (0, 8)
    assert evaluator.running == ""


async def _eval_open(broker: Broker, count: int) -> bool:
    if not await broker.client.exists(broker.keys.meta):
        return False
    return (await broker.backlog()).eval_open == count


async def test_evaluations_in_between_do_not_stop_training(
    tmp_path: Path, run_name: str, redis_url: str, live: Broker
) -> None:
    config = make_config(tmp_path, run_name, eval__every_steps=2, learner__steps=5)
    async with coordinating(config, redis_url) as running:
        crew = Crew(live, config)
        await crew.join()
        working = asyncio.create_task(crew.work())
        assert await asyncio.wait_for(running, 60) == 0
        await working
    labels = [line["label"] for line in metrics(config) if line["kind"] == "eval"]
    assert labels[0] == "first"
    assert labels[-1] == "last"
    assert set(labels[1:-1]) <= {"step2", "step4"}
    assert len(labels) == len(set(labels)) >= 3


async def test_a_redis_that_comes_back_empty_is_fed_again(
    config: Config, redis_url: str, live: Broker
) -> None:
    async with coordinating(config, redis_url) as running:
        crew = Crew(live, config)
        await crew.join()
        for _ in range(3):
            await crew.turn()
        await live.delete_run()

        async def there_again() -> bool:
            return bool(await live.client.exists(live.keys.meta))

        await until(there_again, "the run to be made again")
        crew = Crew(live, config)
        await crew.join()
        working = asyncio.create_task(crew.work())
        assert await asyncio.wait_for(running, 60) == 0
        await working
    groups = {line["group"] for line in metrics(config) if line["kind"] == "outcome"}
    assert {group for group in groups if group.endswith("r1")}
    assert (await live.audit()).balanced


async def test_a_run_that_is_done_is_left_alone(
    config: Config, redis_url: str, live: Broker
) -> None:
    async with coordinating(config, redis_url) as running:
        crew = Crew(live, config)
        await crew.join()
        working = asyncio.create_task(crew.work())
        assert await asyncio.wait_for(running, 60) == 0
        await working
    before = metrics(config)
    async with coordinating(config, redis_url) as again:
        assert await asyncio.wait_for(again, 20) == 0
    assert metrics(config) == before
