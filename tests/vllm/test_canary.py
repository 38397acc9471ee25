"""Swaps that go wrong are seen, by read-back or by the probe; good ones raise no alarm."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ringasync.weights.canary import ProbeGate
from tests.vllm.kit import ON_GPU, engine_kit, faulty_engine, make_engine, reference
from tests.vllm.models import VOCAB_SIZE, write_dense, write_moe
from tests.workers.engine_contract import EngineContract
from tests.workers.engine_kit import Collector, prompts, request
from workers.engines.base import ScoreRequest
from workers.engines.vllm.engine import VllmEngine

pytestmark = pytest.mark.timeout(420)

PROBE = [
    ScoreRequest((1, 2, 3 + i), tuple((7 * i + j) % VOCAB_SIZE for j in range(24)))
    for i in range(6)
]
GOOD_SWAPS = 60


async def swap(engine: VllmEngine, folder: Path, version: int) -> None:
    """One swap as the worker makes it."""
    await engine.prepare(folder)
    await engine.pause()
    await engine.load_weights(folder, version)
    await engine.resume()


async def wrong_names(engine: VllmEngine) -> list[str]:
    """Tensors whose live values are not the loaded folder's."""
    digests = await engine.read_back()
    return sorted(
        name for name, found in digests.items() if not re.fullmatch("[0-9a-f]{32}", found)
    )


async def probe_gaps(engine: VllmEngine, folder: Path) -> np.ndarray:
    """|engine - reference| over all probe tokens."""
    scores = await engine.score(PROBE)
    return np.concatenate(
        [
            np.abs(score - reference(folder, ask.prompt_ids, ask.token_ids))
            for ask, score in zip(PROBE, scores, strict=True)
        ]
    )


def nearly(folder: Path, source: Path, relative: float) -> Path:
    """A copy of a policy, every weight off by a tiny part: a step at a small learning rate."""
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    save_file(
        {name: tensor * (1 + relative) for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


@pytest.mark.skipif(ON_GPU, reason="the faults are the CPU backend's")
@pytest.mark.parametrize("kind", ["tied", "moe"])
async def test_what_the_cpu_backend_corrupts_is_seen_when_it_is_not_cured(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (
        write_dense(tmp_path / f"w{i}", seed=i, tied=True)
        if kind == "tied"
        else write_moe(tmp_path / f"w{i}", seed=i)
        for i in range(2)
    )
    with faulty_engine("uncured", monkeypatch) as engine:
        await engine.start(old, 1)
        assert await wrong_names(engine) == []
        gate = ProbeGate(1e-3, 1e-2)
        assert gate.check(await probe_gaps(engine, old)).accepted
        await swap(engine, new, 2)
        wrong = await wrong_names(engine)
        result = gate.check(await probe_gaps(engine, new))
        await engine.stop()
    print(f"{kind}: {len(wrong)} tensors differ, mean gap {result.gap_mean:.3g} nats")
    assert wrong, "read-back saw nothing"
    assert all("experts" in name if kind == "moe" else "embed" in name for name in wrong)
    assert not result.accepted, "the probe saw nothing"


async def test_a_swap_that_was_not_applied_is_seen_where_the_probe_is_blind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = write_dense(tmp_path / "old", seed=0, tied=False)
    new = nearly(tmp_path / "new", old, relative=0.02 if ON_GPU else 1e-6)
    with faulty_engine("forgetful", monkeypatch) as engine:
        await engine.start(old, 1)
        gate = ProbeGate(1e-3, 1e-2)
        assert gate.check(await probe_gaps(engine, old)).accepted
        await swap(engine, new, 2)
        result = gate.check(await probe_gaps(engine, new))
        wrong = await wrong_names(engine)
        await engine.stop()
    names = set(load_file(new / "model.safetensors"))
    if not ON_GPU:  # in half precision a step that rounds to the same weights changes nothing
        assert result.accepted, "the learning rate was to be too small for the probe"
    assert len(wrong) == len(names)


async def test_good_swaps_of_a_moe_raise_no_alarm_and_are_exact(tmp_path: Path) -> None:
    folders = [write_moe(tmp_path / f"w{i}", seed=i) for i in range(2)]
    kit, suite = engine_kit(folders), EngineContract()
    engine = make_engine()
    await engine.start(folders[0], 3)
    await suite.test_in_flight_swap_keeps_logprobs_true_and_labels_exact(kit, engine)
    gate = ProbeGate(1e-3, 1e-2)
    for number in range(GOOD_SWAPS):
        folder = folders[number % 2]
        await swap(engine, folder, 6 + number)
        assert await wrong_names(engine) == []
        result = gate.check(await probe_gaps(engine, folder))
        assert result.accepted, f"false alarm at swap {number}: {result.problem}"
    sink = engine._sink
    assert sink is not None
    assert sink.other_labels == 0, "vLLM labels tokens with another version than we do"
    await engine.stop()


async def test_kept_kv_shows_in_the_logprobs(tmp_path: Path) -> None:
    folders = [write_dense(tmp_path / f"w{i}", seed=i, tied=False) for i in range(2)]
    engine = make_engine(kv="keep")
    await engine.start(folders[0], 1)
    collector = Collector(engine)
    prompt = prompts(engine_kit(folders), 1)[0]
    await engine.generate([request("r", prompt, 60)])
    await collector.until_tokens("r", 5)
    await swap(engine, folders[1], 2)
    await collector.until_finished("r")
    await engine.stop()
    got = collector["r"]
    cut = got.versions.count(1)
    assert 0 < cut < 60
    expected = reference(folders[1], [*prompt, *got.tokens[:cut]], got.tokens[cut:])
    assert np.abs(np.asarray(got.logprobs[cut:]) - expected).max() > 1e-2


@pytest.mark.skipif(
    ON_GPU and torch.cuda.device_count() < 2, reason="two GPUs are needed for two ranks"
)
async def test_two_tensor_parallel_ranks_swap_and_read_back(tmp_path: Path) -> None:
    folders = [write_dense(tmp_path / f"w{i}", seed=i, tied=False) for i in range(2)]
    engine = make_engine(tensor_parallel_size=2)
    await engine.start(folders[0], 3)
    assert await wrong_names(engine) == []
    kit, suite = engine_kit(folders), EngineContract()
    await suite.test_in_flight_swap_keeps_logprobs_true_and_labels_exact(kit, engine)
    assert await wrong_names(engine) == []
    await swap(engine, folders[0], 6)
    assert (await probe_gaps(engine, folders[0])).max() < kit.max_gap_nats
    await engine.stop()


async def test_siblings_and_resumed_partials_use_the_prefix_cache(tmp_path: Path) -> None:
    folder = write_dense(tmp_path / "w", seed=0, tied=False)
    engine = make_engine(
        engine_args={"max_model_len": 1024, "block_size": 128 if not ON_GPU else 16}
    )
    await engine.start(folder, 1)
    collector = Collector(engine)
    prompt = [(5 * i) % VOCAB_SIZE for i in range(300)]
    engine._max_model_len_tokens = 1024
    await engine.generate([request("first", prompt, 8)])
    await collector.until_finished("first")
    before = engine.prompt_tokens
    prefix = collector["first"].tokens
    await engine.generate([request("sibling", prompt, 4), request("resumed", prompt, 4, prefix)])
    await collector.until_finished("sibling", "resumed")
    total, cached = (now - then for now, then in zip(engine.prompt_tokens, before, strict=True))
    await engine.stop()
    assert total == 2 * len(prompt) + len(prefix)
    assert cached >= 2 * 256, f"only {cached} of {total} prompt tokens came from the cache"
