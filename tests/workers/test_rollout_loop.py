"""The worker with scripted engines and a real Redis: leases, swaps, parking, draining."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from ringasync.records.states import Phase
from workers.engines.base import SamplingParams
from workers.engines.scripted import ScriptedEngine

from .world import World, until

MakeWorld = Callable[..., Coroutine[Any, Any, World]]


def manual(sampling: SamplingParams) -> ScriptedEngine:
    """An engine that steps only when the test says so."""
    return ScriptedEngine(sampling, step_interval_s=None)


async def test_a_rollout_is_generated_and_finished(make_world: MakeWorld) -> None:
    world = await make_world()
    folder = await world.publish(1)
    await world.feed("g1", "g2", size=3)
    running = await world.start("w1")
    ids = [f"{group}.{i}" for group in ("g1", "g2") for i in range(3)]
    await world.wait_state("finished", *ids)
    for rollout_id in ids:
        response = await world.record(rollout_id)
        assert len(response.token_ids) == 40
        await world.assert_true_logprobs(rollout_id, {1: folder})
        assert await world.field(rollout_id, "finish") == "length"
    assert await running.stop() == "stopped by a test"
    await world.assert_balanced()


async def test_begun_under_3_and_finished_elsewhere_under_5_is_one_record_of_three_spans(
    make_world: MakeWorld,
) -> None:
    world = await make_world()
    folders = {3: await world.publish(3)}
    await world.feed("g1", size=1, max_new_tokens=60)
    first = await world.start("first", manual)
    await until(lambda: first.engines and first.engine.active == 1, "the rollout to be taken")
    first.engine.step(11)
    folders[4] = await world.publish(4)
    await until(lambda: first.worker.weights.loaded_number == 4, "version 4")
    first.engine.step(7)
    await first.stop()
    assert await world.state("g1.0") == "parked"
    assert await world.length("g1.0") == 18
    folders[5] = await world.publish(5)
    second = await world.start("second")
    await world.wait_state("finished", "g1.0")
    response = await world.record("g1.0")
    assert response.policy_versions.tolist() == [3] * 11 + [4] * 7 + [5] * 42
    await world.assert_true_logprobs("g1.0", folders)
    events = [(e["event"], e.get("worker", "")) for e in await world.broker.history("g1.0")]
    assert [event for event, _ in events].count("leased") == 2
    assert {worker.split(".")[0] for event, worker in events if event == "leased"} == {
        "first",
        "second",
    }
    await second.stop()
    await world.assert_balanced()


async def test_swaps_in_flight_keep_every_label_true(make_world: MakeWorld) -> None:
    world = await make_world()
    folders = {1: await world.publish(1)}
    await world.feed("g1", size=8, max_new_tokens=150)
    running = await world.start("w1")
    ids = [f"g1.{i}" for i in range(8)]
    for version in (2, 3, 4):
        before = running.worker.status()["tokens_generated"]
        await until(
            lambda seen=before: int(running.worker.status()["tokens_generated"]) > int(seen) + 80,  # type: ignore[misc]
            "some tokens",
        )
        folders[version] = await world.publish(version)
        await until(
            lambda v=version: running.worker.weights.loaded_number == v,  # type: ignore[misc]
            f"version {version}",
        )
    await world.wait_state("finished", *ids)
    seen: set[int] = set()
    for rollout_id in ids:
        response = await world.record(rollout_id)
        assert len(response.token_ids) == 150
        seen.update(response.policy_versions.tolist())
        await world.assert_true_logprobs(rollout_id, folders)
    assert seen == {1, 2, 3, 4}
    await running.stop()
    await world.assert_balanced()


async def test_drain_parks_everything_with_every_token(make_world: MakeWorld) -> None:
    world = await make_world()
    await world.publish(1)
    await world.feed("g1", size=4, max_new_tokens=100)
    running = await world.start("w1", manual)
    await until(lambda: running.engines and running.engine.active == 4, "four rollouts")
    running.engine.step(13)
    why = await running.stop()
    assert why == "stopped by a test"
    ids = [f"g1.{i}" for i in range(4)]
    assert await world.states(*ids) == {"parked"}
    assert {await world.length(rollout_id) for rollout_id in ids} == {13}
    assert await world.broker.sessions() == []
    history = await world.broker.history("g1.0")
    assert history[-1]["event"] == "parked"
    assert history[-1]["why"] == "stopped by a test"
    await world.assert_balanced()


async def test_without_tokens_a_drained_rollout_is_queued_again(make_world: MakeWorld) -> None:
    world = await make_world()
    await world.publish(1)
    await world.feed("g1", size=2)
    running = await world.start("w1", manual)
    await until(lambda: running.engines and running.engine.active == 2, "two rollouts")
    await running.stop()
    assert await world.states("g1.0", "g1.1") == {"queued"}
    assert await world.field("g1.0", "attempts") in ("", "0")


async def test_the_run_s_end_ends_the_worker(make_world: MakeWorld) -> None:
    world = await make_world()
    await world.publish(1)
    running = await world.start("w1")
    await world.broker.set_phase(world.coordinator, Phase.DONE)
    async with asyncio.timeout(10):
        assert await running.task == "run is done"
    assert await world.broker.sessions() == []


async def test_a_paused_run_stands_still_and_goes_on(make_world: MakeWorld) -> None:
    world = await make_world()
    folder = await world.publish(1)
    await world.feed("g1", size=2, max_new_tokens=190)
    running = await world.start("w1")
    await until(lambda: running.worker.status()["tokens_generated"], "tokens")
    await world.broker.set_paused(True, "a test")
    await until(lambda: "run paused" in str(running.worker.status()["doing"]), "the pause")
    generated = running.worker.status()["tokens_generated"]

    async def all_sent() -> bool:
        return await world.length("g1.0") + await world.length("g1.1") == generated

    await until(all_sent, "every token to be sent at the pause")
    await world.heartbeats(3)
    assert running.worker.status()["tokens_generated"] == generated
    assert await world.states("g1.0", "g1.1") == {"leased"}
    await world.broker.set_paused(False)
    await world.wait_state("finished", "g1.0", "g1.1")
    await world.assert_true_logprobs("g1.0", {1: folder})


async def test_a_closing_round_parks_train_rollouts_and_the_next_resumes_them(
    make_world: MakeWorld,
) -> None:
    world = await make_world(mode="rounds")
    await world.publish(1)
    await world.feed("g1", size=3, max_new_tokens=100)
    await world.broker.open_round(world.coordinator, world.request(), 1)
    running = await world.start("w1", manual)
    await until(lambda: running.engines and running.engine.active == 3, "three rollouts")
    running.engine.step(9)
    await world.broker.close_round(world.coordinator, world.request(), 1)
    ids = ["g1.0", "g1.1", "g1.2"]
    await world.wait_state("parked", *ids)
    assert {await world.length(rollout_id) for rollout_id in ids} == {9}
    assert {await world.field(rollout_id, "retention") for rollout_id in ids} == {"1"}
    assert (await world.broker.history("g1.0"))[-1]["why"] == "round closed"
    assert await world.broker.round_to_training(world.coordinator, 1)
    await world.publish(2)
    await world.broker.finish_round(world.learner, 1)
    await world.broker.open_round(world.coordinator, world.request(), 2)
    await until(lambda: running.engine.active == 3, "the next round")
    await until(lambda: running.worker.weights.loaded_number == 2, "version 2")
    running.engine.step(91)
    await world.wait_state("finished", *ids)
    response = await world.record("g1.0")
    assert response.policy_versions.tolist() == [1] * 9 + [2] * 91
    await world.assert_balanced()


async def test_evaluation_runs_under_the_pinned_version_only(make_world: MakeWorld) -> None:
    world = await make_world()
    await world.publish(1)
    running = await world.start("w1", manual)
    await until(lambda: running.worker.weights.loaded_number == 1, "version 1")
    assert await world.broker.set_pin(world.coordinator, True) == 1
    await world.feed("e1", size=2, kind="eval")
    await until(lambda: running.engine.active == 2, "the evaluation")
    await world.publish(2)
    running.engine.step(20)
    await until(lambda: running.worker.session.poll.latest_version == 2, "the news of version 2")
    assert running.worker.weights.loaded_number == 1
    await until(lambda: not running.worker.control.held_by, "the engine to be free")
    running.engine.step(20)
    await world.wait_state("finished", "e1.0", "e1.1")
    assert set((await world.record("e1.0")).policy_versions.tolist()) == {1}
    await world.broker.set_pin(world.coordinator, False)
    await until(lambda: running.worker.weights.loaded_number == 2, "version 2 after the pin")


async def test_a_late_worker_loads_the_pinned_version_not_the_newest(make_world: MakeWorld) -> None:
    world = await make_world()
    await world.publish(1)
    await world.broker.set_pin(world.coordinator, True)
    await world.publish(2)
    running = await world.start("w1")
    await until(lambda: running.worker.weights.loaded is not None, "a version")
    assert running.worker.weights.loaded_number == 1


async def test_a_purged_rollout_is_dropped(make_world: MakeWorld) -> None:
    world = await make_world()
    await world.publish(1)
    await world.feed("g1", "g2", size=1, max_new_tokens=100)
    running = await world.start("w1", manual)
    await until(lambda: running.engines and running.engine.active == 2, "two rollouts")
    running.engine.step(10)
    await until(lambda: len(running.worker.store) == 2, "both in hand")
    assert await world.broker.end_group(world.coordinator, "g1", "purged", "a test")
    # Unsent tokens hold the engine, and one that is held does not step.
    await until(lambda: not running.worker.control.held_by, "the engine to be free")
    running.engine.step(10)
    await until(lambda: running.engine.active == 1, "the purged one to be aborted")
    assert "g1.0" not in running.worker.store
    await until(lambda: _has_length(world, "g2.0", 20), "what was sampled to be sent")
    await until(lambda: not running.worker.control.held_by, "the engine to be free")
    running.engine.step(80)
    await world.wait_state("finished", "g2.0")
    await world.assert_balanced()


async def test_rollouts_that_are_complete_already_are_finished_at_once(
    make_world: MakeWorld,
) -> None:
    world = await make_world()
    await world.publish(1)
    await world.feed("g1", size=1, max_new_tokens=16)
    first = await world.start("first", manual)
    await until(lambda: first.engines and first.engine.active == 1, "the rollout")
    # The last append went through, the finish did not: its worker died in between.
    first.engine.step(15)
    await until(lambda: _has_length(world, "g1.0", 15), "the appends")
    lease = next(iter(first.worker.store)).lease
    from ringasync.broker.types import AppendItem
    from ringasync.records.segment import encode_segment, policy_segment

    payload = encode_segment(policy_segment(15, 1, [4], [-1.0]))
    item = AppendItem("g1.0", lease.token, 15, 1, 1, 1, payload)
    assert await world.broker.append_many(first.worker.session.session_id, [item]) == ["ok"]
    await world.broker.close_session(first.worker.session.session_id)
    first.task.cancel()
    second = await world.start("second", manual)
    await world.wait_state("finished", "g1.0")
    assert second.engine.active == 0
    assert await world.length("g1.0") == 16
    await world.assert_balanced()


async def _has_length(world: World, rollout_id: str, length: int) -> bool:
    return await world.length(rollout_id) == length


async def test_poison_prompts_are_quarantined_and_the_rest_goes_on(make_world: MakeWorld) -> None:
    world = await make_world()
    await world.publish(1)
    await world.feed("long", size=2, prompt_ids=[1] * 300)
    await world.feed("empty", size=1, prompt_ids=[])
    await world.feed("foreign", size=1, prompt_ids=[1, 10_000])
    await world.feed("spoiled", size=2)
    await world.broker.client.hset(world.broker.keys.group("spoiled"), "prompt_ids", '[1, "two"]')
    await world.feed("good", size=2)
    running = await world.start("w1")
    await world.wait_state("finished", "good.0", "good.1")

    async def all_ended() -> bool:
        poison = ("long", "empty", "foreign", "spoiled")
        ends = [await world.broker.group(name) or {} for name in poison]
        return all(group.get("state") == "quarantined" for group in ends)

    await until(all_ended, "the poison to be quarantined")
    reasons = {o.group_id: o.reason for o in await world.broker.read_outcomes("0", 10)}
    assert "window of 200" in reasons["long"]
    assert "empty" in reasons["empty"]
    assert "vocabulary" in reasons["foreign"]
    assert "must be a JSON list of token ids" in reasons["spoiled"]
    await running.stop()
    await world.assert_balanced()


async def test_an_unreadable_record_is_quarantined(make_world: MakeWorld) -> None:
    world = await make_world()
    await world.publish(1)
    await world.feed("g1", "g2", size=1)
    first = await world.start("first", manual)
    await until(lambda: first.engines and first.engine.active == 2, "the rollouts")
    first.engine.step(10)
    await first.stop()
    key = world.broker.keys.segments("g1.0")
    whole = await world.broker.client.lindex(key, 0)
    assert isinstance(whole, bytes)
    await world.broker.client.delete(key)
    await world.broker.client.rpush(key, whole[: len(whole) // 2])
    await world.start("second")
    await world.wait_state("finished", "g2.0")
    group = await world.broker.group("g1")
    assert group is not None
    assert group["state"] == "quarantined"
