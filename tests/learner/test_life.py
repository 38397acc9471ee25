"""What happens to a learner besides training: signals, locks, rollbacks, bad records."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from ringasync.records.states import Phase

from ..conftest import RedisServer
from .checkpoint_kit import newest_checkpoint
from .kit import (
    Feeder,
    LearnerProcess,
    check_ledger,
    config_path,
    until,
    write_config,
)


@asynccontextmanager
async def learner_of(
    feeder: Feeder, redis: RedisServer, *, crash_at: str = "", extra: Sequence[str] = ()
) -> AsyncIterator[LearnerProcess]:
    learner = LearnerProcess.start(config_path(feeder), redis.url, crash_at=crash_at, extra=extra)
    try:
        yield learner
    finally:
        learner.stop()


async def test_first_signal_checkpoints_and_frees_the_lock(
    feeder: Feeder, any_redis: RedisServer
) -> None:
    await feeder.feed(5)
    async with learner_of(feeder, any_redis) as learner:
        await feeder.reached(2)
        learner.process.terminate()
        assert await learner.wait() == 0, learner.log()
    assert newest_checkpoint(feeder).meta.step == await feeder.step()
    fence = await feeder.broker.acquire_lock("learner", "test", 1000)
    await feeder.broker.release_lock(fence)


async def test_waits_for_the_run_and_reports_what_it_waits_for(
    tmp_path: Path, model_dir: Path, any_redis: RedisServer, run_name: str
) -> None:
    path = write_config(tmp_path, run_name, model_dir, steps=1)
    learner = LearnerProcess.start(path, any_redis.url)

    async def said(text: str) -> bool:
        return learner.log_path.exists() and text in learner.log()

    await until(lambda: said("waiting for the coordinator"), "its first words")
    feeder = await Feeder.make(any_redis.url, path)
    await until(lambda: said("learner is waiting"), "a stall report")
    assert "120 ready tokens" in learner.log()
    assert "worker feeder" in learner.log()
    await feeder.feed(5)
    assert await learner.wait() == 0, learner.log()
    await check_ledger(feeder, 120)
    await feeder.close()


async def test_a_second_learner_is_refused_or_waits(feeder: Feeder, any_redis: RedisServer) -> None:
    async with learner_of(feeder, any_redis) as first:
        await feeder.published(1)
        async with learner_of(feeder, any_redis, extra=["--no-wait"]) as refused:
            assert await refused.wait() == 4
            assert f":{first.process.pid}" in refused.log()
        async with learner_of(feeder, any_redis) as second:

            async def waiting() -> bool:
                return "waiting for the learner's lock" in second.log()

            await until(waiting, "the second learner to wait")
            first.process.kill()
            await feeder.feed(14)
            assert await second.wait() == 0, second.log()
    await check_ledger(feeder, 5 * 120)


async def test_a_learner_that_lost_its_lock_stops(feeder: Feeder, any_redis: RedisServer) -> None:
    async with learner_of(feeder, any_redis) as learner:
        await feeder.published(1)
        await feeder.broker.client.delete(feeder.broker.keys.lock("learner"))
        await feeder.broker.acquire_lock("learner", "a rival", 60_000)
        assert await learner.wait() == 5
        assert "FencedError" in learner.log()
    await feeder.feed(5)
    assert await feeder.step() == 0


async def test_a_paused_learner_that_wakes_changes_nothing(
    feeder: Feeder, any_redis: RedisServer
) -> None:
    async with learner_of(feeder, any_redis) as zombie:
        await feeder.feed(14)
        await feeder.reached(1)
        pid = zombie.process.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        async with learner_of(feeder, any_redis) as successor:
            assert await successor.wait() == 0, successor.log()
        await check_ledger(feeder, 5 * 120)
        final = newest_checkpoint(feeder).meta
        versions = await feeder.broker.version_steps()
        os.kill(pid, signal.SIGCONT)
        assert await zombie.wait() == 5, zombie.log()
    assert newest_checkpoint(feeder).meta == final
    assert await feeder.broker.version_steps() == versions
    await check_ledger(feeder, 5 * 120)


async def test_the_end_of_the_data_trains_what_is_left(
    feeder: Feeder, any_redis: RedisServer
) -> None:
    await feeder.feed(3)
    total = sum(feeder.tokens.values())
    assert 120 < total < 240
    async with learner_of(feeder, any_redis) as learner:
        await feeder.reached(1)
        await feeder.broker.set_phase(feeder.coordinator, Phase.FINISHING)
        assert await learner.wait() == 0, learner.log()
    ledger = await feeder.broker.ledger()
    assert ledger["trained"] + ledger["masked"] == total
    metrics = await feeder.metrics()
    assert metrics[0]["budget_fill"] == 1.0
    assert metrics[-1]["budget_fill"] < 1.0
    assert metrics[-1]["num_carried_in"] > 0
    await check_ledger(feeder, ledger["trained"])


async def test_broken_records_are_quarantined_with_the_reason(
    feeder: Feeder, any_redis: RedisServer
) -> None:
    ids = await feeder.feed(16)
    segments = feeder.broker.keys.segments
    client: Any = feeder.broker.client
    await client.lset(segments(f"{ids[0]}.2"), 0, b"\x81\xa1k\x00cut short")
    await client.rpush(segments(f"{ids[4]}.0"), await client.lindex(segments(f"{ids[4]}.0"), 0))
    await client.hset(feeder.broker.keys.group(ids[7]), "prompt_ids", "[1, -2]")
    async with learner_of(feeder, any_redis) as learner:
        assert await learner.wait() == 0, learner.log()
    whys = ((ids[0], "not msgpack"), (ids[4], "starts at 0"), (ids[7], "prompt_ids must lie in"))
    for broken, why in whys:
        group = await feeder.broker.group(broken)
        assert group is not None
        assert group["state"] == "quarantined"
        assert why in group["reason"]
    await check_ledger(feeder, 5 * 120)
    assert (await feeder.broker.ledger())["quarantined"] > 0


async def test_stale_groups_end_and_the_learner_goes_on(
    tmp_path: Path, model_dir: Path, any_redis: RedisServer, run_name: str
) -> None:
    path = write_config(tmp_path, run_name, model_dir, steps=4, max_staleness=1)
    feeder = await Feeder.make(any_redis.url, path)
    await feeder.feed(14)
    async with learner_of(feeder, any_redis) as learner:
        await feeder.reached(2)

        async def stale() -> bool:
            return (await feeder.broker.ledger())["stale"] > 0

        await until(stale, "the rest to go stale")
        await feeder.published(3)
        await feeder.feed(8, versions=(3,))
        assert await learner.wait() == 0, learner.log()
    await check_ledger(feeder, 4 * 120)
    await feeder.close()


async def test_a_rollout_over_three_versions_trains(
    tmp_path: Path, model_dir: Path, any_redis: RedisServer, run_name: str
) -> None:
    path = write_config(tmp_path, run_name, model_dir, steps=6)
    feeder = await Feeder.make(any_redis.url, path)
    await feeder.feed(9)
    async with learner_of(feeder, any_redis) as learner:
        await feeder.reached(4)
        await feeder.published(5)
        await feeder.feed(8, versions=(3, 4, 5))
        assert await learner.wait() == 0, learner.log()
    last = (await feeder.metrics())[-1]
    assert last["step"] == 6
    assert set(last["staleness_tokens"]) == {"1", "2", "3"}  # steps 2, 3 and 4, seen from 5
    assert last["versions_per_rollout_mean"] > 2.5
    assert set(last["mask_rate_by_age"]) == {"1", "2", "3"}
    await check_ledger(feeder, 6 * 120)
    await feeder.close()


async def test_redis_loses_its_tail_while_the_learner_lives(
    feeder: Feeder, any_redis: RedisServer
) -> None:
    async with learner_of(feeder, any_redis) as learner:
        await feeder.published(1)
        before = await feeder.snapshot()
        await feeder.feed(5)
        await feeder.reached(2)
        await feeder.published(3)
        await feeder.roll_back(before)
        await feeder.broker.begin_incarnation(feeder.coordinator, "test")
        await feeder.reopen()
        await feeder.reached(2)  # forced from the journal

        async def said_again() -> bool:
            return max(await feeder.broker.version_steps()) > 3

        await until(said_again, "a version above every number seen")
        await feeder.feed(12)
        assert await learner.wait() == 0, learner.log()
    await check_ledger(feeder, 5 * 120)


async def test_redis_loses_its_tail_and_nobody_notices(
    feeder: Feeder, any_redis: RedisServer
) -> None:
    async with learner_of(feeder, any_redis) as learner:
        await feeder.published(1)
        await feeder.feed(1)
        before = await feeder.snapshot()
        await feeder.feed(4)
        await feeder.published(3)
        await feeder.roll_back(before)  # the first group is ready once more
        await feeder.feed(12)
        assert await learner.wait() == 0, learner.log()
        assert "taken before are ready again" in learner.log()
    await check_ledger(feeder, 5 * 120)


async def test_redis_comes_back_empty(feeder: Feeder, any_redis: RedisServer) -> None:
    await feeder.feed(14)
    async with learner_of(feeder, any_redis, crash_at="marked:3") as learner:
        assert await learner.wait() == -signal.SIGKILL
    await feeder.broker.delete_run()
    again = await Feeder.make(any_redis.url, config_path(feeder))
    again.num_groups, again.tokens = 100, feeder.tokens
    async with learner_of(again, any_redis) as learner:
        await again.reached(4)
        await again.published(5)
        await again.feed(6, versions=(5,))
        assert await learner.wait() == 0, learner.log()
    await check_ledger(again, 5 * 120)
    position = newest_checkpoint(again).meta.data_position
    assert '"low":0' not in position
    await again.broker.close()


async def test_rounds_train_each_round_once(
    tmp_path: Path, model_dir: Path, any_redis: RedisServer, run_name: str
) -> None:
    path = write_config(tmp_path, run_name, model_dir, steps=2, mode="rounds")
    feeder = await Feeder.make(any_redis.url, path)
    broker, fence = feeder.broker, feeder.coordinator

    async def finished(round_id: int) -> bool:
        meta = await broker.run_meta()
        return meta["round_state"] == "none" and meta["round_id"] == str(round_id)

    async def hand_over(round_id: int, groups: int) -> None:
        await broker.open_round(fence, f"open-{round_id}", round_id)
        await feeder.feed(groups)
        await broker.close_round(fence, f"close-{round_id}", round_id)
        assert await broker.round_to_training(fence, round_id)

    async with learner_of(feeder, any_redis, crash_at="published:1") as learner:
        await feeder.published(1)
        await hand_over(1, 4)
        assert await learner.wait() == -signal.SIGKILL
    async with learner_of(feeder, any_redis) as learner:
        await until(lambda: finished(1), "round 1 to be finished")
        assert await feeder.step() == 1
        assert (await broker.backlog()).ready_groups > 0  # surplus groups stay ready
        await hand_over(2, 1)
        assert await learner.wait() == 0, learner.log()
        await until(lambda: finished(2), "round 2 to be finished")
    assert [row["step"] for row in await feeder.metrics()] == [1, 2]
    await check_ledger(feeder, (await broker.ledger())["trained"])
    await feeder.close()


async def test_a_small_round_trains_below_the_budget(
    tmp_path: Path, model_dir: Path, any_redis: RedisServer, run_name: str
) -> None:
    path = write_config(tmp_path, run_name, model_dir, steps=1, mode="rounds")
    feeder = await Feeder.make(any_redis.url, path)
    broker, fence = feeder.broker, feeder.coordinator
    async with learner_of(feeder, any_redis) as learner:
        await feeder.published(1)
        await broker.open_round(fence, "open-1", 1)
        await broker.close_round(fence, "close-1", 1)
        assert await broker.round_to_training(fence, 1)

        async def empty_round_finished() -> bool:
            return (await broker.run_meta())["round_state"] == "none"

        await until(empty_round_finished, "the empty round to be finished")
        assert await feeder.step() == 0
        await broker.open_round(fence, "open-2", 2)
        await feeder.feed(1)
        await broker.close_round(fence, "close-2", 2)
        assert await broker.round_to_training(fence, 2)
        assert await learner.wait() == 0, learner.log()
    (row,) = await feeder.metrics()
    assert 0 < row["budget_fill"] < 1
    assert row["tokens_masked"] == 0
    await check_ledger(feeder, sum(feeder.tokens.values()))
    await feeder.close()


async def test_two_learners_race_for_the_lock(feeder: Feeder, any_redis: RedisServer) -> None:
    await feeder.feed(14)
    async with learner_of(feeder, any_redis) as one, learner_of(feeder, any_redis) as other:
        codes = await asyncio.gather(one.wait(), other.wait())
        assert list(codes) == [0, 0], one.log()
    await check_ledger(feeder, 5 * 120)


async def test_a_batch_of_carried_trajectories_alone(
    tmp_path: Path, model_dir: Path, any_redis: RedisServer, run_name: str
) -> None:
    path = write_config(tmp_path, run_name, model_dir, steps=6, budget=32)
    feeder = await Feeder.make(any_redis.url, path)
    await feeder.feed(4)
    async with learner_of(feeder, any_redis, crash_at="committed:3") as learner:
        assert await learner.wait() == -signal.SIGKILL
    async with learner_of(feeder, any_redis) as learner:
        assert await learner.wait() == 0, learner.log()
    rows = await feeder.metrics()
    assert min(row["num_groups"] for row in rows) == 0
    await check_ledger(feeder, 6 * 32)
    await feeder.close()


async def test_refused_weights_stop_the_learner_until_lifted(
    feeder: Feeder, any_redis: RedisServer
) -> None:
    async with learner_of(feeder, any_redis) as learner:
        await feeder.published(1)
        for worker in ("w1", "w2"):
            await feeder.broker.open_session(worker, "worker", 60_000, {"worker": worker})
            await feeder.broker.report_bad_version(worker, 1, "canary")
        await feeder.feed(14)
        assert await learner.wait() == 1
        assert "publication is blocked" in learner.log()
    await feeder.broker.set_paused(False)  # what `ringasync resume` does
    async with learner_of(feeder, any_redis) as learner:
        assert await learner.wait() == 0, learner.log()
    await check_ledger(feeder, 5 * 120)
