"""What vLLM cannot serve, and what it answers that nobody may train on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from ringasync.errors import EngineError, SchemaError
from ringasync.records.segment import encode_segment, policy_segment
from tests.vllm.kit import engine_processes, make_engine
from tests.vllm.models import write_dense
from workers.engines.base import GenerationRequest, TokenChunk


async def test_too_little_memory_is_refused_with_the_settings_that_help(tmp_path: Path) -> None:
    """A KV cache below one rollout's window, as on a GPU that is too small."""
    folder = write_dense(tmp_path / "model", seed=0, tied=False)
    engine = make_engine(kv_cache_bytes=4096)
    with pytest.raises(EngineError) as caught:
        await engine.start(folder, 1)
    for setting in ("gpu_memory_utilization", "kv_cache_bytes", "max_model_len_tokens"):
        assert setting in str(caught.value)
    await engine.stop()
    assert not engine_processes()


async def test_a_folder_vllm_cannot_load_is_named(tmp_path: Path) -> None:
    folder = write_dense(tmp_path / "broken", seed=0, tied=False)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    engine = make_engine()
    with pytest.raises(EngineError, match=r"cannot serve .*broken"):
        await engine.start(folder, 1)
    await engine.stop()
    assert not engine_processes()


async def test_nan_logprobs_come_through_as_nan_and_make_no_segment(tmp_path: Path) -> None:
    folder = write_dense(tmp_path / "nan", seed=0, tied=False)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] *= math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    engine = make_engine()
    await engine.start(folder, 1)
    await engine.generate([GenerationRequest("g.0", (1, 2, 3), (), 4, 0)])
    chunks: list[TokenChunk] = []
    while not any(chunk.finish for chunk in chunks):
        chunks += await engine.outputs()
    await engine.stop()
    tokens = [token for chunk in chunks for token in chunk.token_ids]
    logprobs = [value for chunk in chunks for value in chunk.behavior_logprobs]
    assert len(tokens) == len(logprobs) == 4
    assert all(math.isnan(value) for value in logprobs)
    with pytest.raises(SchemaError, match="NaN"):
        encode_segment(policy_segment(0, 1, tokens, logprobs))
