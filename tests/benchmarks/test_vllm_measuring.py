"""The vLLM benchmarks without vLLM: loads, gaps between tokens, speeds, models on disk."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import vllm_models
from benchmarks.vllm_arms import full_rate
from benchmarks.vllm_models import SHAPES, Load, parse_engine_args, response_lengths, total_tokens
from benchmarks.vllm_swap import _result
from benchmarks.vllm_swapper import Found, Mode, Settings, mean_of, percent_of
from benchmarks.vllm_traffic import Rollout, Traffic, longest_gap, usual_gap
from workers.engines.base import GenerationRequest, TokenChunk
from workers.engines.vllm import compat


def test_lengths_have_the_mean_and_a_tail() -> None:
    lengths = response_lengths(256, 600, 2400)
    assert sum(lengths) / 256 == pytest.approx(600, rel=0.03)
    assert lengths == sorted(lengths)
    assert lengths[-1] > 3 * 600
    assert min(lengths) < 200


def test_groups_differ_between_salts_in_nothing_but_the_first_id() -> None:
    load = Load(rollouts=64, mean_tokens=600, vocab_size=32_000)
    first, second = load.groups(1), load.groups(2)
    assert sum(group.size for group in first) == 64
    for a, b in zip(first, second, strict=True):
        assert a.prompt_ids[0] != b.prompt_ids[0]
        assert a.prompt_ids[1:] == b.prompt_ids[1:]
        assert a.max_new_tokens == b.max_new_tokens
        assert 64 <= len(a.prompt_ids) <= 256
        assert len(a.prompt_ids) + a.max_new_tokens <= load.window_tokens
    assert total_tokens(first) == sum(8 * group.max_new_tokens for group in first)


def test_full_rate_leaves_the_ends_out() -> None:
    marks = [(0.0, 0), (10.0, 100), (11.0, 300), (12.0, 500), (50.0, 1000)]
    assert full_rate(marks, 1000) == 200
    assert full_rate([(0.0, 0), (1.0, 1000)], 1000) == 0


def test_longest_gap_spans_the_swap() -> None:
    arrivals = [1.0, 1.1, 1.2, 3.2, 3.3, 9.0]
    assert longest_gap(arrivals, 1.25, 3.25) == pytest.approx(2.0)
    assert longest_gap(arrivals, 1.15, 2.0) == pytest.approx(2.0)
    assert longest_gap(arrivals, 0.5, 2.0) is None  # began meanwhile
    assert longest_gap(arrivals, 1.25, 9.5) is None  # ended meanwhile


def test_usual_gap_is_of_what_lies_within() -> None:
    arrivals = [0.0, 5.0, 5.1, 5.2, 5.4, 9.0]
    assert usual_gap(arrivals, 4.9, 6.0) == pytest.approx(0.1)
    assert usual_gap(arrivals, 5.15, 6.0) is None


def test_a_rollout_knows_where_each_version_began() -> None:
    rollout = Rollout(GenerationRequest("r", (1,), (), 9, 0))
    rollout.add(TokenChunk("r", (5, 6), (-1.0, -2.0), 1), 0.5)
    rollout.add(TokenChunk("r", (7,), (-3.0,), 2), 0.7)
    rollout.add(TokenChunk("r", (), (), 2, "length"), 0.8)
    assert rollout.first_of_version == {1: 0, 2: 2}
    assert rollout.tokens == [5, 6, 7]
    assert rollout.arrivals == [0.5, 0.7]
    assert rollout.ended


async def test_traffic_replaces_what_ended() -> None:
    traffic = Traffic(_Silent(), Load(rollouts=8, mean_tokens=10, vocab_size=512))
    await traffic.control.start(Path(), 1)
    await traffic.start()
    try:
        await _until(traffic, 8)
        ended = next(iter(traffic.running))
        traffic._on_tokens([TokenChunk(ended, (1,), (-1.0,), 1, "length")])
        await _until(traffic, 8)
        assert ended not in traffic.running
        assert traffic.finished == 1
    finally:
        await traffic.stop()


async def _until(traffic: Traffic, count: int) -> None:
    for _ in range(100):
        if len(traffic.running) == count:
            return
        await asyncio.sleep(0)
    pytest.fail(f"{len(traffic.running)} rollouts run, not {count}")


class _Silent(SimpleNamespace):
    """An engine that takes requests and never says a word."""

    renews_kv = False

    async def start(self, *_: Any) -> None: ...

    async def stop(self) -> None: ...

    async def generate(self, _: Any) -> None: ...

    async def outputs(self) -> list[TokenChunk]:
        await asyncio.Event().wait()
        return []


def test_models_are_written_once_and_changed_a_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_file = pytest.importorskip("safetensors.torch").load_file
    monkeypatch.setattr(compat, "is_cpu", lambda: True)
    small = {"num_hidden_layers": 1, "hidden_size": 64, "moe_intermediate_size": 32}
    shape = SHAPES["moe"] | small | {"vocab_size": 64, "num_experts": 4}
    monkeypatch.setitem(vllm_models.SHAPES, "small", shape)
    source = vllm_models.write_model(tmp_path / "a", "small")
    assert vllm_models.write_model(tmp_path / "a", "small") == source
    changed = vllm_models.write_changed(tmp_path / "b", source, 0.1)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, changed))
    assert before.keys() == after.keys()
    # Names of the checkpoint, expert by expert: what vLLM loads.
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    moved = (after[name] - before[name]).std() / before[name].std()
    assert float(moved) == pytest.approx(0.1, rel=0.1)
    assert json.loads((changed / "config.json").read_text())["num_local_experts"] == 4


def test_engine_args_are_an_object() -> None:
    assert parse_engine_args("") == {}
    assert parse_engine_args('{"block_size": 16}') == {"block_size": 16}
    with pytest.raises(ValueError, match="JSON object"):
        parse_engine_args("[1]")


def test_a_result_of_few_samples_can_be_shown() -> None:
    found = Found(stalls=[0.1, 0.2], usual=[0.01], errors=[0.5])
    result = _result(Settings(), {str(Mode("direct", "recompute", "device")): found})
    for table in result.tables:
        assert table.markdown()
    assert percent_of([], 50) == mean_of([]) == 0
