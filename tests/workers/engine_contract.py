"""What every engine must do. A test module gives an ``EngineKit`` by a fixture named ``kit``.

::

    class TestMyEngine(EngineContract): ...

The suite knows nothing of the engine but its protocol; the kit makes engines and weights and gives
the reference log-probs they are compared with.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import xxhash
from safetensors import safe_open

from ringasync.errors import EngineError
from workers.engines.base import Engine, SamplingParams, ScoreRequest

from .engine_kit import NEVER_SAMPLED, TIMEOUT_S, Collector, EngineKit, prompts, request


class EngineContract:
    """The suite; subclass it and give the fixture ``kit``."""

    @pytest.fixture
    async def engine(self, kit: EngineKit) -> AsyncIterator[Engine]:
        """A running engine at temperature 1 that never samples EOS, under version 3."""
        engine = kit.make(SamplingParams(1.0, (NEVER_SAMPLED,)))
        await engine.start(kit.weights(0), 3)
        yield engine
        await engine.stop()

    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    async def test_logprobs_equal_a_plain_forward(self, kit: EngineKit, temperature: float) -> None:
        engine = kit.make(SamplingParams(temperature, (NEVER_SAMPLED,)))
        await engine.start(kit.weights(0), 1)
        collector = Collector(engine)
        given = prompts(kit, 7)
        await engine.generate([request(f"r{i}", p, 24) for i, p in enumerate(given)])
        await collector.until_finished(*(f"r{i}" for i in range(len(given))))
        await engine.stop()
        for i, prompt in enumerate(given):
            got = collector[f"r{i}"]
            expected = kit.reference(kit.weights(0), prompt, got.tokens, temperature)
            assert np.abs(np.asarray(got.logprobs) - expected).max() < kit.max_gap_nats
            assert len(got.tokens) == 24

    async def test_in_flight_swap_keeps_logprobs_true_and_labels_exact(
        self, kit: EngineKit, engine: Engine
    ) -> None:
        collector = Collector(engine)
        given = prompts(kit, 6)
        names = [f"r{i}" for i in range(len(given))]
        await engine.generate([request(n, p, 40) for n, p in zip(names, given, strict=True)])
        await collector.until_tokens("r5", 5)
        await engine.pause()
        await collector.rest()
        before = {name: len(collector[name].tokens) for name in names}
        await engine.load_weights(kit.weights(1), 5)
        await engine.resume()
        await collector.until_finished(*names)
        assert any(0 < count < 40 for count in before.values())
        for name, prompt in zip(names, given, strict=True):
            got, cut = collector[name], before[name]
            assert got.versions == [3] * cut + [5] * (40 - cut)
            old = kit.reference(kit.weights(0), prompt, got.tokens[:cut], 1.0)
            new = kit.reference(kit.weights(1), [*prompt, *got.tokens[:cut]], got.tokens[cut:], 1.0)
            expected = np.concatenate([old, new])
            assert np.abs(np.asarray(got.logprobs) - expected).max() < kit.max_gap_nats

    async def test_no_token_is_lost_or_doubled_over_many_swaps(
        self, kit: EngineKit, engine: Engine
    ) -> None:
        collector = Collector(engine)
        given = prompts(kit, 4)
        names = [f"r{i}" for i in range(len(given))]
        await engine.generate([request(n, p, 90) for n, p in zip(names, given, strict=True)])
        for version in range(4, 9):
            # A fast engine may have ended all of them by now, and then nothing more would come.
            if any(collector[name].finish is None for name in names):
                await collector.read()
            await engine.pause()
            await engine.load_weights(kit.weights(version % 2), version)
            await engine.resume()
        await collector.until_finished(*names)
        assert len({version for name in names for version in collector[name].versions}) >= 2
        for name, prompt in zip(names, given, strict=True):
            got = collector[name]
            assert len(got.tokens) == 90
            assert got.versions == sorted(got.versions)
            for start, version in _spans(got.versions):
                end = start + got.versions.count(version)
                weights = kit.weights(0 if version == 3 else version % 2)
                expected = kit.reference(
                    weights, [*prompt, *got.tokens[:start]], got.tokens[start:end], 1.0
                )
                gap = np.abs(np.asarray(got.logprobs[start:end]) - expected).max()
                assert gap < kit.max_gap_nats

    async def test_tokens_nobody_has_read_survive_a_swap(
        self, kit: EngineKit, engine: Engine
    ) -> None:
        collector = Collector(engine)
        prompt = prompts(kit, 1)[0]
        async with asyncio.timeout(TIMEOUT_S):
            for attempt in range(100):  # the engine decides how far it gets before the pause
                name = f"r{attempt}"
                await engine.generate([request(name, prompt, 60)])
                await asyncio.sleep(0.01 * (attempt + 1))
                await engine.pause()
                await engine.load_weights(kit.weights(attempt % 2), 4 + attempt)
                await engine.resume()
                await collector.until_finished(name)
                if len(set(collector[name].versions)) == 2:
                    break
        got = collector[name]
        cut = got.versions.count(3 + attempt)
        assert got.versions == [3 + attempt] * cut + [4 + attempt] * (60 - cut)
        assert 0 < cut < 60

    async def test_pause_without_a_swap_changes_nothing(
        self, kit: EngineKit, engine: Engine
    ) -> None:
        collector = Collector(engine)
        prompt = prompts(kit, 1)[0]
        await engine.generate([request("r", prompt, 30)])
        await collector.until_tokens("r", 3)
        await engine.pause()
        await engine.pause()
        await collector.rest()
        paused_at = len(collector["r"].tokens)
        await collector.rest()
        assert len(collector["r"].tokens) == paused_at
        await engine.resume()
        await collector.until_finished("r")
        expected = kit.reference(kit.weights(0), prompt, collector["r"].tokens, 1.0)
        assert np.abs(np.asarray(collector["r"].logprobs) - expected).max() < kit.max_gap_nats

    @pytest.mark.parametrize("swap", ["never", "asleep", "awake"])
    async def test_requests_sleep_and_go_on_as_if_paused(
        self, kit: EngineKit, engine: Engine, swap: str
    ) -> None:
        collector = Collector(engine)
        given = prompts(kit, 3)
        names = ["r0", "r1"]
        await engine.generate([request(n, p, 40) for n, p in zip(names, given, strict=False)])
        await engine.generate([request("gone", given[2], 90)])
        await collector.until_tokens("r1", 5)
        await engine.sleep()
        await engine.sleep()
        await collector.rest()
        before = {name: len(collector[name].tokens) for name in names}
        for refused in (engine.resume, engine.read_back):
            with pytest.raises(EngineError, match="asleep"):
                await refused()
        await engine.abort(["gone"])
        kept = list(collector["gone"].tokens)
        if swap == "asleep":
            await engine.load_weights(kit.weights(1), 5)
        await engine.wake()
        await engine.wake()
        await collector.rest()
        assert {name: len(collector[name].tokens) for name in names} == before
        if swap == "awake":
            await engine.load_weights(kit.weights(1), 5)
        assert await engine.read_back() == _file_digests(kit.weights(int(swap != "never")))
        await engine.resume()
        await collector.until_finished(*names)
        assert collector["gone"].tokens == kept
        version, later = (3, 0) if swap == "never" else (5, 1)
        for name, prompt in zip(names, given, strict=False):
            got, cut = collector[name], before[name]
            assert got.versions == [3] * cut + [version] * (40 - cut)
            old = kit.reference(kit.weights(0), prompt, got.tokens[:cut], 1.0)
            context = [*prompt, *got.tokens[:cut]]
            new = kit.reference(kit.weights(later), context, got.tokens[cut:], 1.0)
            gap = np.abs(np.asarray(got.logprobs) - np.concatenate([old, new]))
            assert gap.max() < kit.max_gap_nats

    async def test_abort_keeps_what_was_delivered_and_delivers_no_more(
        self, kit: EngineKit, engine: Engine
    ) -> None:
        collector = Collector(engine)
        given = prompts(kit, 2)
        await engine.generate([request("gone", given[0], 60), request("stays", given[1], 60)])
        await collector.until_tokens("gone", 2)
        await engine.abort(["gone", "never-heard-of"])
        await collector.rest()
        kept = list(collector["gone"].tokens)
        await collector.until_finished("stays")
        assert collector["gone"].tokens == kept
        assert collector["gone"].finish is None
        assert len(collector["stays"].tokens) == 60

    async def test_an_aborted_id_can_be_used_again(self, kit: EngineKit, engine: Engine) -> None:
        collector = Collector(engine)
        prompt = prompts(kit, 1)[0]
        await engine.generate([request("r", prompt, 60)])
        await collector.until_tokens("r", 2)
        await engine.abort(["r"])
        await collector.rest()
        done = collector["r"].tokens[:]
        await engine.generate([request("r", prompt, 5, prefix=done)])
        await collector.until_finished("r")
        tokens = collector["r"].tokens
        assert len(tokens) == len(done) + 5
        expected = kit.reference(kit.weights(0), [*prompt, *done], tokens[len(done) :], 1.0)
        got = np.asarray(collector["r"].logprobs[len(done) :])
        assert np.abs(got - expected).max() < kit.max_gap_nats

    async def test_requests_made_while_paused_run_after_resume_under_the_new_version(
        self, kit: EngineKit, engine: Engine
    ) -> None:
        collector = Collector(engine)
        prompt = prompts(kit, 1)[0]
        await engine.pause()
        await engine.generate([request("r", prompt, 8)])
        await collector.rest()
        assert collector["r"].tokens == []
        await engine.load_weights(kit.weights(1), 4)
        await engine.resume()
        await collector.until_finished("r")
        assert collector["r"].versions == [4] * 8
        expected = kit.reference(kit.weights(1), prompt, collector["r"].tokens, 1.0)
        assert np.abs(np.asarray(collector["r"].logprobs) - expected).max() < kit.max_gap_nats

    async def test_eos_ends_with_stop_and_is_the_last_token(self, kit: EngineKit) -> None:
        eos = tuple(range(0, kit.vocab_size, 4))
        engine = kit.make(SamplingParams(1.0, eos))
        await engine.start(kit.weights(0), 1)
        collector = Collector(engine)
        names = [f"r{i}" for i in range(16)]
        given = prompts(kit, 16)
        await engine.generate([request(n, p, 12) for n, p in zip(names, given, strict=True)])
        await collector.until_finished(*names)
        await engine.stop()
        ends = {collector[name].finish for name in names}
        assert "stop" in ends
        for name in names:
            *body, last = collector[name].tokens
            assert not set(body) & set(eos)
            stopped = collector[name].finish == "stop"
            assert (last in eos) == stopped
            assert stopped or len(body) + 1 == 12

    async def test_max_new_tokens_counts_beyond_the_prefix(
        self, kit: EngineKit, engine: Engine
    ) -> None:
        collector = Collector(engine)
        prompt, prefix = prompts(kit, 2)
        await engine.generate(
            [request("one", prompt, 1, prefix), request("six", prompt, 6, prefix)]
        )
        await collector.until_finished("one", "six")
        assert [len(collector[name].tokens) for name in ("one", "six")] == [1, 6]
        assert {collector[name].finish for name in ("one", "six")} == {"length"}
        tokens = collector["six"].tokens
        expected = kit.reference(kit.weights(0), [*prompt, *prefix], tokens, 1.0)
        assert np.abs(np.asarray(collector["six"].logprobs) - expected).max() < kit.max_gap_nats

    async def test_context_given_to_generate_is_counted(
        self, kit: EngineKit, engine: Engine
    ) -> None:
        collector = Collector(engine)
        first, second = prompts(kit, 2)
        before = engine.prompt_tokens
        await engine.generate([request("a", first, 2), request("b", first, 2, second)])
        await collector.until_finished("a", "b")
        total, cached = (now - then for now, then in zip(engine.prompt_tokens, before, strict=True))
        assert total == 2 * len(first) + len(second)
        assert 0 <= cached < total

    async def test_more_requests_than_run_at_once_all_finish(
        self, kit: EngineKit, engine: Engine
    ) -> None:
        collector = Collector(engine)
        names = [f"r{i}" for i in range(40)]
        given = prompts(kit, 40)
        await engine.generate([request(n, p, 7) for n, p in zip(names, given, strict=True)])
        await collector.until_finished(*names)
        assert {len(collector[name].tokens) for name in names} == {7}

    async def test_score_gives_logprobs_at_temperature_one_while_running(
        self, kit: EngineKit
    ) -> None:
        engine = kit.make(SamplingParams(0.5, (NEVER_SAMPLED,)))
        await engine.start(kit.weights(0), 1)
        given = prompts(kit, 6)
        await engine.generate([request("busy", given[5], 60)])
        asked = [ScoreRequest(tuple(given[i]), tuple(given[i + 1])) for i in range(4)]
        scores = await engine.score(asked)
        assert await engine.score([]) == []
        await engine.pause()
        await engine.load_weights(kit.weights(1), 2)
        await engine.resume()
        scores_new = await engine.score(asked)
        await engine.stop()
        for ask, old, new in zip(asked, scores, scores_new, strict=True):
            assert old.dtype == np.float32
            for weights, got in ((0, old), (1, new)):
                expected = kit.reference(kit.weights(weights), ask.prompt_ids, ask.token_ids, 1.0)
                assert np.abs(got - expected).max() < kit.max_gap_nats

    async def test_read_back_equals_the_file(self, kit: EngineKit, engine: Engine) -> None:
        assert await engine.read_back() == _file_digests(kit.weights(0))
        await engine.pause()
        await engine.load_weights(kit.weights(1), 4)
        await engine.resume()
        assert await engine.read_back() == _file_digests(kit.weights(1))
        assert _file_digests(kit.weights(0)) != _file_digests(kit.weights(1))

    @pytest.mark.parametrize("damage", ["absent", "cut", "empty"])
    async def test_a_broken_folder_is_an_engine_error(
        self, kit: EngineKit, engine: Engine, tmp_path: Path, damage: str
    ) -> None:
        folder = tmp_path / "broken"
        folder.mkdir()
        whole = (kit.weights(1) / "model.safetensors").read_bytes()
        (folder / "config.json").write_bytes((kit.weights(1) / "config.json").read_bytes())
        if damage != "absent":
            content = whole[: len(whole) // 2] if damage == "cut" else b""
            (folder / "model.safetensors").write_bytes(content)
        await engine.pause()
        with pytest.raises(EngineError):
            await engine.load_weights(folder, 4)
        other = kit.make(SamplingParams(1.0, (NEVER_SAMPLED,)))
        with pytest.raises(EngineError):
            await other.start(folder, 4)
        await other.stop()

    async def test_weights_load_only_while_paused(self, kit: EngineKit, engine: Engine) -> None:
        with pytest.raises(EngineError, match="pause"):
            await engine.load_weights(kit.weights(1), 4)

    async def test_impossible_requests_are_refused(self, kit: EngineKit, engine: Engine) -> None:
        with pytest.raises(ValueError, match="no context"):
            await engine.generate([request("r", [], 4)])
        with pytest.raises(ValueError, match="nothing to sample"):
            await engine.generate([request("r", [1], 0)])

    async def test_stop_is_idempotent_and_ends_generation(
        self, kit: EngineKit, engine: Engine
    ) -> None:
        await engine.generate([request("r", prompts(kit, 1)[0], 60)])
        async with asyncio.timeout(TIMEOUT_S):
            await engine.stop()
            await engine.stop()
        with pytest.raises(EngineError):
            await engine.generate([request("s", [1], 4)])

    async def test_stop_while_paused_does_not_hang(self, kit: EngineKit, engine: Engine) -> None:
        await engine.generate([request("r", prompts(kit, 1)[0], 60)])
        await engine.pause()
        async with asyncio.timeout(TIMEOUT_S):
            await engine.stop()

    async def test_stop_before_start(self, kit: EngineKit) -> None:
        await kit.make(SamplingParams(1.0, ())).stop()

    async def test_a_dead_engine_raises_instead_of_hanging(
        self, kit: EngineKit, engine: Engine
    ) -> None:
        await engine.generate([request("r", prompts(kit, 1)[0], 60)])
        kit.kill(engine)

        async def read_for_ever() -> None:
            while True:
                await engine.outputs()

        with pytest.raises(EngineError):
            await asyncio.wait_for(read_for_ever(), TIMEOUT_S)
        async with asyncio.timeout(TIMEOUT_S):
            await engine.stop()


def _spans(versions: Sequence[int]) -> list[tuple[int, int]]:
    """(start, version) of each run of equal versions."""
    return [(i, v) for i, v in enumerate(versions) if i == 0 or versions[i - 1] != v]


def _file_digests(folder: Path) -> dict[str, str]:
    digests = {}
    with safe_open(folder / "model.safetensors", framework="np") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            digests[name] = xxhash.xxh3_128_hexdigest(file.get_tensor(name).tobytes())
    return digests
