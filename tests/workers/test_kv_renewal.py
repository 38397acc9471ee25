"""``kv = "rolling"``: every rollout in flight is submitted anew once a swap, and loses nothing."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.workers.engine_kit import Collected, request
from workers.engine_control import EngineControl
from workers.engines.base import GenerationRequest, SamplingParams, TokenChunk
from workers.engines.scripted import ScriptedEngine, scripted_logprobs, write_scripted_weights
from workers.kv_renewal import KvRenewal

LENGTH = 60
NEVER_EOS = 1000


def chunk(name: str, *tokens: int, finish: str | None = None) -> TokenChunk:
    return TokenChunk(name, tokens, (0.0,) * len(tokens), 1, finish)  # type: ignore[arg-type]


def renewal_of(*requests: GenerationRequest) -> KvRenewal:
    renewal = KvRenewal()
    renewal.submitted(requests)
    return renewal


def test_waves_follow_each_other_by_their_context() -> None:
    renewal = renewal_of(*(request(name, [1] * 10, 50) for name in "abcd"))
    renewal.absorb([chunk("a", 7, 8), chunk("b", 9)])
    assert renewal.wave(100) == []
    renewal.swapped()
    assert renewal.due == 4
    assert renewal.wave(23) == ["a", "b"]  # 12 + 11 tokens
    assert renewal.wave(22) == ["a"]
    assert renewal.wave(1) == ["a"], "one request alone may be longer than a wave"
    found = renewal.renewed(["a", "b"])
    assert [(one.prefix_ids, one.max_new_tokens) for one in found] == [((7, 8), 48), ((9,), 49)]
    renewal.submitted(found)
    assert renewal.wave(100) == ["c", "d"]
    assert not renewal.settled.is_set()
    renewal.absorb([chunk("a", 1)])
    assert not renewal.settled.is_set()
    renewal.absorb([chunk("b", 1, 2)])
    assert renewal.settled.is_set()
    renewal.swapped()
    again = renewal.renewed(renewal.wave(1000))
    assert [one.prefix_ids for one in again] == [(7, 8, 1), (9, 1, 2), (), ()]


def test_what_ended_or_left_is_not_submitted_again() -> None:
    renewal = renewal_of(*(request(name, [1] * 10, 50) for name in "abc"))
    renewal.swapped()
    wave = renewal.wave(1000)
    renewal.absorb([chunk("a", 4, finish="stop")])
    renewal.gone(["b"])
    found = renewal.renewed(wave)
    assert [one.request_id for one in found] == ["c"]
    renewal.submitted(found)
    assert not renewal.settled.is_set()
    renewal.gone(["c"])
    assert renewal.settled.is_set()
    assert renewal.due == 0


class Engine(ScriptedEngine):
    """Remembers what was submitted."""

    def __init__(self, *, renews_kv: bool = True) -> None:
        super().__init__(SamplingParams(1.0, (NEVER_EOS,)), renews_kv=renews_kv)
        self.submitted: list[GenerationRequest] = []

    async def generate(self, requests: Sequence[GenerationRequest]) -> None:
        self.submitted += requests
        await super().generate(requests)


class Run:
    """Twelve requests in a control over such an engine."""

    def __init__(self, tmp_path: Path, *, renews_kv: bool = True) -> None:
        self.folders = [write_scripted_weights(tmp_path / f"w{i}", float(i)) for i in range(3)]
        self.engine = Engine(renews_kv=renews_kv)
        self.changed = asyncio.Event()
        self.got: dict[str, Collected] = {}
        self.control = EngineControl(lambda _: self.engine, self._take, self.changed, 64)
        self.requests = [request(f"r{i}", range(1, 5 + i), LENGTH) for i in range(12)]

    def _take(self, chunks: Sequence[TokenChunk]) -> None:
        for one in chunks:
            self.got.setdefault(one.request_id, Collected()).take(one)
        self.changed.set()

    async def begin(self) -> None:
        await self.control.start(self.folders[0], 1)
        await self.control.submit(self.requests)
        await self.until(lambda: self.least_tokens() >= 5)

    async def until(self, happened: object) -> None:
        assert callable(happened)
        async with asyncio.timeout(20.0):
            while not happened():
                self.changed.clear()
                await self.changed.wait()

    def least_tokens(self) -> int:
        return min((len(one.tokens) for one in self.got.values()), default=0)

    def running(self) -> set[str]:
        return {name for name, one in self.got.items() if one.finish is None}

    async def swap(self, number: int) -> None:
        await self.control.hold("weights")
        await self.control.load(self.folders[number - 1], number)
        await self.control.release("weights")

    async def until_finished(self, *names: str) -> None:
        wanted = names or tuple(one.request_id for one in self.requests)
        await self.until(lambda: all(self.got[name].finish for name in wanted))

    def check(self, *names: str) -> None:
        """Nothing lost, nothing twice, and every log-prob is of the version it names."""
        tensors = [load_file(folder / "model.safetensors") for folder in self.folders]
        for one in self.requests:
            if names and one.request_id not in names:
                continue
            got = self.got[one.request_id]
            assert len(got.tokens) == LENGTH
            assert got.versions == sorted(got.versions)
            context = list(one.prompt_ids)
            for token, logprob, version in zip(got.tokens, got.logprobs, got.versions, strict=True):
                expected = scripted_logprobs(tensors[version - 1], context, 1.0)[token]
                assert logprob == pytest.approx(float(expected), abs=1e-6)
                context.append(token)


async def test_every_rollout_in_flight_is_submitted_anew_once_and_loses_nothing(
    tmp_path: Path,
) -> None:
    run = Run(tmp_path)
    await run.begin()
    in_flight = run.running()
    assert len(in_flight) == 12
    await run.swap(2)
    await run.until_finished()
    await run.control.stop()
    run.check()
    again = run.engine.submitted[12:]
    assert {one.request_id for one in again} == in_flight
    assert max(Counter(one.request_id for one in again).values()) == 1
    for one in again:
        got = run.got[one.request_id]
        assert one.prefix_ids == tuple(got.tokens[: len(one.prefix_ids)])
        assert len(one.prefix_ids) >= got.versions.count(1)


async def test_another_swap_in_the_middle_renews_all_again(tmp_path: Path) -> None:
    run = Run(tmp_path)
    await run.begin()
    await run.swap(2)
    await run.until(lambda: len(run.engine.submitted) > 12)
    in_flight = run.running()
    assert in_flight
    await run.swap(3)
    await run.until_finished()
    await run.control.stop()
    run.check()
    latest = {one.request_id: one for one in run.engine.submitted}
    for name in in_flight:
        if 3 in run.got[name].versions:
            assert len(latest[name].prefix_ids) >= run.got[name].versions.index(3)


async def test_nothing_is_renewed_while_the_engine_is_held(tmp_path: Path) -> None:
    run = Run(tmp_path)
    await run.begin()
    await run.control.hold("run paused")
    await run.swap(2)
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(run.engine.submitted) == 12
    await run.control.release("run paused")
    await run.until_finished()
    await run.control.stop()
    run.check()
    assert len(run.engine.submitted) > 12


async def test_an_aborted_rollout_does_not_come_back(tmp_path: Path) -> None:
    run = Run(tmp_path)
    await run.begin()
    await run.swap(2)
    await run.control.abort(["r11", "r3"])
    left = [f"r{i}" for i in range(11) if i != 3]
    await run.until_finished(*left)
    assert run.engine.active == 0
    await run.control.stop()
    run.check(*left)


async def test_an_engine_that_recomputes_by_itself_is_left_alone(tmp_path: Path) -> None:
    run = Run(tmp_path, renews_kv=False)
    await run.begin()
    await run.swap(2)
    await run.until_finished()
    await run.control.stop()
    run.check()
    assert len(run.engine.submitted) == 12


async def test_a_stop_in_the_middle_of_a_wave_ends_it(tmp_path: Path) -> None:
    run = Run(tmp_path)
    await run.begin()
    await run.swap(2)
    await run.control.stop()
    assert not any(task.get_name() == "renew-kv" for task in asyncio.all_tasks())
    assert np.isfinite([value for one in run.got.values() for value in one.logprobs]).all()
