"""Swaps that are not what they should be: nothing sampled under them reaches the broker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file

from ringasync.errors import EngineError
from ringasync.records.weights import ProbeSequence
from ringasync.weights.canary import ProbeGate, compare_read_back, probe_gaps
from ringasync.weights.manifest import VersionFields, build_manifest
from workers.engines.base import SamplingParams, ScoreRequest, TokenChunk
from workers.engines.scripted import ScriptedEngine
from workers.engines.transformers_engine import TransformersEngine

from .test_transformers_engine import write_model
from .world import World, until

MakeWorld = Callable[..., Coroutine[Any, Any, World]]


class IdleSwapEngine(ScriptedEngine):
    """Says that it loaded and did not: the label changes, the weights stay."""

    async def load_weights(self, weights_dir: Path, policy_version: int) -> None:
        self._policy_version = policy_version


class WrongAnswerEngine(ScriptedEngine):
    """Holds the right weights after a swap and answers wrong, like a stale cache would."""

    swapped = False

    async def load_weights(self, weights_dir: Path, policy_version: int) -> None:
        await super().load_weights(weights_dir, policy_version)
        self.swapped = True

    async def score(self, requests: Any) -> list[npt.NDArray[np.float32]]:
        scores = await super().score(requests)
        return [score - 0.3 for score in scores] if self.swapped else scores


class SlowCanaryEngine(ScriptedEngine):
    """Its read-back after a swap waits until the test opens the gate."""

    def __init__(self, sampling: SamplingParams) -> None:
        super().__init__(sampling, step_interval_s=None)
        self.gate = asyncio.Event()
        self.gate.set()
        self.tamper = False

    async def load_weights(self, weights_dir: Path, policy_version: int) -> None:
        await super().load_weights(weights_dir, policy_version)
        self.gate.clear()

    async def read_back(self) -> dict[str, str]:
        digests = await super().read_back()
        await self.gate.wait()
        return {**digests, "model.scale": "0" * 32} if self.tamper else digests


async def _failed_swap(world: World, make: Callable[[SamplingParams], Any]) -> Any:
    """Generate under 1, publish 2 to an engine that spoils it, wait until it was refused."""
    await world.publish(1)
    await world.feed("g1", size=4, max_new_tokens=190)
    running = await world.start("w1", make)
    await until(lambda: int(running.worker.status()["tokens_generated"]) > 50, "tokens")
    await world.publish(2)
    await until(lambda: 2 in running.worker.weights.refused, "version 2 to be refused")
    return running


@pytest.mark.parametrize(
    ("engine", "why"), [(IdleSwapEngine, "live tensors differ"), (WrongAnswerEngine, "gap")]
)
async def test_a_bad_swap_is_refused_reported_and_survived(
    make_world: MakeWorld, engine: type[ScriptedEngine], why: str
) -> None:
    world = await make_world()
    running = await _failed_swap(world, lambda s: engine(s, step_interval_s=0.001))
    assert why in running.worker.weights.refused[2]
    ids = [f"g1.{i}" for i in range(4)]
    await world.wait_state("finished", *ids)
    for rollout_id in ids:
        assert set((await world.record(rollout_id)).policy_versions.tolist()) == {1}
    assert len(running.engines) == 2
    history = await world.broker.history("g1.0")
    assert any("failed its canary" in str(event.get("why")) for event in history)
    who = await world.broker.client.hgetall(world.broker.keys.prefix + "bad:2")
    assert list(who) == [b"w1"]
    await running.stop()
    await world.assert_balanced()


async def test_two_workers_that_refuse_a_version_stop_publication(make_world: MakeWorld) -> None:
    world = await make_world()
    await world.publish(1)
    pair = [await world.start(n, lambda s: IdleSwapEngine(s, step_interval_s=0.001)) for n in "ab"]
    await until(lambda: all(r.worker.weights.loaded_number == 1 for r in pair), "version 1")
    await world.publish(2)
    await until(lambda: pair[0].worker.session.poll.bad_versions == (2,), "version 2 to be bad")
    meta = await world.broker.run_meta()
    assert "version 2 failed on 2 workers" in meta["publication_blocked"]
    # A third worker does not even try it, and takes the newest that may be loaded.
    third = await world.start("c")
    await until(lambda: third.worker.weights.loaded is not None, "a version")
    assert third.worker.weights.loaded_number == 1
    assert third.worker.weights.refused == {}


async def test_a_late_worker_goes_down_to_the_newest_version_that_it_can_load(
    make_world: MakeWorld,
) -> None:
    world = await make_world()
    await world.publish(2)  # and 3 is never announced
    await world.publish(4)
    (folder,) = (world.config.run_dir / "weights").glob("v000004-*/")
    folder.rename(folder.with_name("gone"))
    await world.publish(5, probe_error=3.0)
    await world.feed("g1", size=1)
    running = await world.start("w1")
    await world.wait_state("finished", "g1.0")
    assert set((await world.record("g1.0")).policy_versions.tolist()) == {2}
    assert list(running.worker.weights.refused) == [5]
    await world.publish(6)
    await until(lambda: running.worker.weights.loaded_number == 6, "version 6")


async def test_with_no_version_that_can_be_loaded_a_late_worker_waits(
    make_world: MakeWorld,
) -> None:
    world = await make_world()
    await world.publish(3, probe_error=3.0)
    running = await world.start("w1")
    await until(lambda: 3 in running.worker.weights.refused, "version 3 to be refused")
    await until(lambda: "waiting for a policy version" in str(running.worker.status()["doing"]), "")
    await world.publish(4)
    await until(lambda: running.worker.weights.loaded_number == 4, "version 4")


class DyingCanaryEngine(ScriptedEngine):
    """Dies while its first version is on trial, and the pump is the first to see it."""

    def __init__(self, sampling: SamplingParams, *, step_interval_s: float | None) -> None:
        super().__init__(sampling, step_interval_s=step_interval_s)
        self.seen_dead = asyncio.Event()

    async def outputs(self) -> list[TokenChunk]:
        try:
            return await super().outputs()
        except EngineError:
            self.seen_dead.set()
            raise

    async def read_back(self) -> dict[str, str]:
        self.kill("in the canary")
        await self.seen_dead.wait()
        return await super().read_back()


async def test_an_engine_that_dies_in_the_first_canary_does_not_end_the_worker(
    make_world: MakeWorld,
) -> None:
    world = await make_world()
    await world.publish(1)
    await world.feed("g1", size=1)
    kinds: Iterator[type[Any]] = iter((DyingCanaryEngine, ScriptedEngine))
    running = await world.start("w1", lambda s: next(kinds)(s, step_interval_s=0.001))
    await until(lambda: 1 in running.worker.weights.refused, "version 1 to be refused")
    await world.publish(2)
    await world.wait_state("finished", "g1.0")
    assert set((await world.record("g1.0")).policy_versions.tolist()) == {2}
    assert len(running.engines) == 2
    assert not running.task.done()


async def test_tokens_on_trial_are_held_until_the_canary_passed(make_world: MakeWorld) -> None:
    world = await make_world()
    await world.publish(1)
    await world.feed("g1", size=2, max_new_tokens=100)
    running = await world.start("w1", SlowCanaryEngine)
    await until(lambda: running.engines and running.engine.active == 2, "the rollouts")
    running.engine.step(10)
    await world.publish(2)
    await until(lambda: running.worker.store.held_version == 2, "the trial")
    await until(lambda: not running.worker.control.held_by, "the engine to go on")
    running.engine.step(30)
    await until(lambda: running.worker.status()["held_tokens"] == 60, "held tokens")
    await running.worker.flusher.flush(everything=True)  # all that may be sent
    assert [await world.length(f"g1.{i}") for i in range(2)] == [10, 10]
    running.engine.gate.set()
    await until(lambda: running.worker.weights.loaded_number == 2, "the canary")
    running.engine.step(60)
    await world.wait_state("finished", "g1.0", "g1.1")
    response = await world.record("g1.0")
    assert response.policy_versions.tolist() == [1] * 10 + [2] * 90
    await running.stop()
    await world.assert_balanced()


async def test_tokens_on_trial_are_dropped_when_the_canary_fails(make_world: MakeWorld) -> None:
    world = await make_world()
    folder = await world.publish(1)
    await world.feed("g1", size=2, max_new_tokens=40)
    running = await world.start("w1", SlowCanaryEngine)
    await until(lambda: running.engines and running.engine.active == 2, "the rollouts")
    running.engine.step(10)
    await world.publish(2)
    await until(lambda: running.worker.store.held_version == 2, "the trial")
    await until(lambda: not running.worker.control.held_by, "the engine to go on")
    # Both rollouts end under the version on trial; their ends must be forgotten too.
    running.engine.step(30)
    await until(lambda: running.worker.status()["held_tokens"] == 60, "held tokens")
    running.engine.tamper = True
    running.engine.gate.set()
    await until(lambda: len(running.engines) == 2, "another engine")
    await until(lambda: running.engine.active == 2, "the rollouts to come back")
    assert [await world.length(f"g1.{i}") for i in range(2)] == [10, 10]
    running.engine.step(30)
    await world.wait_state("finished", "g1.0", "g1.1")
    assert (await world.record("g1.0")).policy_versions.tolist() == [1] * 40
    await world.assert_true_logprobs("g1.0", {1: folder})
    await running.stop()
    await world.assert_balanced()


async def test_a_drain_during_the_trial_drops_what_is_held(make_world: MakeWorld) -> None:
    world = await make_world(drain_timeout_s=5.0)
    await world.publish(1)
    await world.feed("g1", size=1, max_new_tokens=100)
    running = await world.start("w1", SlowCanaryEngine)
    await until(lambda: running.engines and running.engine.active == 1, "the rollout")
    running.engine.step(10)
    await world.publish(2)
    await until(lambda: running.worker.store.held_version == 2, "the trial")
    running.engine.gate.set()
    await running.stop()
    assert await world.state("g1.0") == "parked"
    versions = (await world.record("g1.0")).policy_versions.tolist()
    assert versions[:10] == [1] * 10
    await world.assert_balanced()


async def test_a_first_version_that_fails_is_waited_out(make_world: MakeWorld) -> None:
    world = await make_world()
    await world.publish(1, probe_error=3.0)
    await world.feed("g1", size=1)
    running = await world.start("w1")
    await until(lambda: 1 in running.worker.weights.refused, "version 1 to be refused")
    await until(lambda: "waiting for a policy version" in str(running.worker.status()["doing"]), "")
    assert await world.state("g1.0") == "queued"
    await world.publish(2)
    await world.wait_state("finished", "g1.0")
    assert set((await world.record("g1.0")).policy_versions.tolist()) == {2}


async def test_a_version_whose_files_are_damaged_is_not_generated_with(
    make_world: MakeWorld,
) -> None:
    world = await make_world()
    await world.publish(1)
    await world.feed("g1", size=1, max_new_tokens=190)
    running = await world.start("w1", lambda s: ScriptedEngine(s, step_interval_s=None))
    await until(lambda: running.engines and running.engine.active == 1, "the rollout")
    await world.broker.set_paused(True, "a test")
    await until(lambda: running.worker.session.poll.paused, "the pause")
    await world.publish(2)
    weights = world.config.run_dir / "weights"
    (file,) = weights.glob("v000002-*/model.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.chmod(0o644)
    file.write_bytes(bytes(content))
    await world.broker.set_paused(False)
    await until(lambda: 2 in running.worker.weights.refused, "version 2 to be refused")
    assert "cannot be fetched" in running.worker.weights.refused[2]
    running.engine.step(190)
    await world.wait_state("finished", "g1.0")
    assert set((await world.record("g1.0")).policy_versions.tolist()) == {1}
    assert len(running.engines) == 1


class IdleSwapTransformers(TransformersEngine):
    """A real model whose swap is not applied."""

    async def load_weights(self, weights_dir: Path, policy_version: int) -> None:
        assert self._outbox is not None
        self._outbox.relabel(policy_version)


async def test_at_a_tiny_learning_rate_only_the_read_back_sees_a_swap_not_applied(
    tmp_path: Path,
) -> None:
    old = write_model(tmp_path / "old", 1, tied=True)
    new = tmp_path / "new"
    new.mkdir()
    for file in ("config.json", "generation_config.json"):
        (new / file).write_bytes((old / file).read_bytes())
    tensors = load_file(old / "model.safetensors")
    save_file(
        {name: tensor * (1 + 1e-6) for name, tensor in tensors.items()},
        new / "model.safetensors",
        metadata={"format": "pt"},
    )
    prompt, tokens = (1, 2, 3), tuple(range(4, 40))

    async def scores(engine: TransformersEngine) -> list[npt.NDArray[np.float32]]:
        return await engine.score([ScoreRequest(prompt, tokens)])

    def engine_of(kind: type[TransformersEngine]) -> TransformersEngine:
        return kind(SamplingParams(1.0, ()), max_concurrent=4, max_model_len_tokens=64, seed=1)

    learner = engine_of(TransformersEngine)
    await learner.start(new, 2)
    logprobs = (await scores(learner))[0]
    await learner.stop()
    probe = ProbeSequence(prompt_ids=prompt, token_ids=tokens, logprobs=tuple(logprobs.tolist()))
    manifest = build_manifest(
        new, VersionFields("run", 2, 1, 0, 1, probe=(probe,)), "file", "v000002-f1"
    )
    engine = engine_of(IdleSwapTransformers)
    await engine.start(old, 1)
    await engine.pause()
    await engine.load_weights(new, 2)
    await engine.resume()
    gate = ProbeGate(1e-3, 1e-2)
    assert gate.check(probe_gaps(manifest, await scores(engine))).accepted
    assert gate.check(probe_gaps(manifest, await scores(engine))).accepted
    problems = compare_read_back(manifest, await engine.read_back())
    assert problems
    assert "differ" in problems[0]
    await engine.stop()
    torch.manual_seed(0)
