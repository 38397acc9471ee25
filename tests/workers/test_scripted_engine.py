"""The scripted engine passes the contract, and steps only when told to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from workers.engines.base import SamplingParams
from workers.engines.scripted import (
    VOCAB_SIZE,
    ScriptedEngine,
    scripted_logprobs,
    write_scripted_weights,
)

from .engine_contract import EngineContract
from .engine_kit import Collector, EngineKit, request


def _reference(
    weights: Path, context: Sequence[int], tokens: Sequence[int], temperature: float
) -> npt.NDArray[np.float32]:
    tensors = load_file(weights / "model.safetensors")
    return np.asarray(
        [
            scripted_logprobs(tensors, [*context, *tokens[:i]], temperature)[token]
            for i, token in enumerate(tokens)
        ],
        dtype=np.float32,
    )


@pytest.fixture
def kit(tmp_path: Path) -> EngineKit:
    folders = [write_scripted_weights(tmp_path / f"w{i}", 1.0 + i) for i in range(2)]
    return EngineKit(
        make=lambda sampling: ScriptedEngine(sampling, step_interval_s=0.001, max_concurrent=16),
        weights=lambda i: folders[i],
        reference=_reference,
        kill=ScriptedEngine.kill,
        vocab_size=VOCAB_SIZE,
    )


class TestScriptedEngine(EngineContract):
    """All of the contract."""


async def test_manual_steps_decide_what_is_sampled(tmp_path: Path) -> None:
    weights = write_scripted_weights(tmp_path / "w", 1.0)
    engine = ScriptedEngine(SamplingParams(1.0, ()), step_interval_s=None)
    await engine.start(weights, 1)
    collector = Collector(engine)
    await engine.generate([request("a", [1], 10), request("b", [2], 10)])
    await collector.rest()
    assert collector["a"].tokens == []
    engine.step(3)
    await collector.read()
    assert [len(collector[name].tokens) for name in "ab"] == [3, 3]
    await engine.pause()
    engine.step(3)
    await collector.rest()
    assert len(collector["a"].tokens) == 3
    await engine.stop()


async def test_same_seed_same_tokens(tmp_path: Path) -> None:
    weights = write_scripted_weights(tmp_path / "w", 1.0)
    runs = []
    for _ in range(2):
        engine = ScriptedEngine(SamplingParams(1.0, ()), step_interval_s=None)
        await engine.start(weights, 1)
        collector = Collector(engine)
        await engine.generate([request("a", [1, 2], 12)])
        engine.step(12)
        await collector.until_finished("a")
        runs.append(collector["a"].tokens)
        await engine.stop()
    assert runs[0] == runs[1]
