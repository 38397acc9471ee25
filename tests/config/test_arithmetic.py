"""The arithmetic of ``ringasync config --check``, against real models and sums done by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ringasync.config.arithmetic import arithmetic, bytes_text, model_shape
from ringasync.config.load import load_config
from ringasync.config.model_shape import (
    ModelShape,
    forward_flops,
    peak_tflops_of,
    read_shape,
    shape_of,
    train_flops,
)

DEMO = Path(__file__).parents[2] / "configs" / "demo.toml"
SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [1],
    },
}
TINY = ModelShape(
    vocab=10, hidden=4, layers=1, heads=2, kv_heads=1, head_dim=2, intermediate=8, tied=True
)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_the_real_model(kind: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **SIZES, **KINDS[kind])
    model = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    assert shape is not None
    assert shape.parameters == sum(each.numel() for each in model.parameters())


@pytest.mark.parametrize("kind", ["qwen3", "mixtral", "qwen3_moe"])
def test_flops_are_those_that_torch_counts(kind: str) -> None:
    """Torch counts whole attention, eager experts each on its tokens: so attention is added."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **SIZES, **KINDS[kind])
    config._attn_implementation = "eager"
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config)
    shape, length = shape_of(config.to_dict()), 12
    assert shape is not None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros((1, length), dtype=torch.long))
    above_diagonal = 4.0 * shape.layers * shape.heads * shape.head_dim * length * (length - 1) / 2
    rotary = 2.0 * length * shape.head_dim // 2
    counted = counter.get_total_flops() - above_diagonal
    assert counted - forward_flops(shape, [length], length) == pytest.approx(0, abs=2 * rotary)


def test_flops_by_hand() -> None:
    # Attention matrices 2 x 4 x 2 x (2 + 1) = 48, feed-forward 3 x 4 x 8 = 96.
    assert TINY.body_matrices_a_token == 144
    # 3 tokens meet 1 + 2 + 3 = 6 others: 4 x 2 x 2 x 6 = 96; one row of logits: 2 x 10 x 4 = 80.
    assert forward_flops(TINY, [3], 1) == 2 * 144 * 3 + 96 + 80
    assert train_flops(TINY, [3], 1) == 3 * forward_flops(TINY, [3], 1)
    assert train_flops(TINY, [3], 1, updates=2) == 7 * forward_flops(TINY, [3], 1)


def test_peaks_are_known_by_name_only() -> None:
    assert peak_tflops_of("NVIDIA H100 80GB HBM3") == 989.0
    assert peak_tflops_of("NVIDIA H200") == 989.0
    assert peak_tflops_of("some other card") == 0.0


def test_an_unknown_model_says_how_to_give_its_shape(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "other"}', encoding="utf-8")
    config = load_config(DEMO, [f"model.path={tmp_path}"])
    assert model_shape(config) is None
    figures = {each.name: each for each in arithmetic(config, None)}
    assert figures["parameters"].value == "unknown"
    assert "--model-config" in figures["parameters"].formula
    assert "learner: together" not in figures


def test_memory_by_part() -> None:
    config = load_config(DEMO, ["model.dtype=bfloat16"])
    figures = {each.name: each for each in arithmetic(config, TINY)}
    count = TINY.parameters  # 40 of embeddings, 4 of the last norm, 48 + 96 + 8 of the layer
    assert count == 196
    assert figures["parameters"].value == "196"
    assert figures["learner: weights, fp32 master"].value == bytes_text(4 * count)
    assert figures["learner: Adam moments, fp32"].value == bytes_text(8 * count)
    assert figures["learner: bf16 copies of the forward"].value == bytes_text(2 * count)
    assert figures["published a version"].value == bytes_text(2 * count)
    assert figures["KV cache a token"].value == "8 B"
    copies = "learner's copies in main memory"
    assert figures[copies].value == bytes_text((12 + 2) * count)
    waits = ["learner.publish_async=false"]
    figures = {each.name: each for each in arithmetic(load_config(DEMO, waits), TINY)}
    assert figures[copies].value == bytes_text(12 * count)
    waits += ["learner.checkpoint_async=false"]
    assert copies not in {each.name for each in arithmetic(load_config(DEMO, waits), TINY)}


def test_ranks_share_all_state_but_the_reference() -> None:
    settings = ["learner.ranks=4", "loss.kl_coef=0.1"]
    figures = {each.name: each for each in arithmetic(load_config(DEMO, settings), TINY)}
    alone = {each.name: each for each in arithmetic(load_config(DEMO, settings[1:]), TINY)}
    for name in ("weights, fp32 master", "gradients, fp32"):
        assert figures[f"learner: {name}"].value == bytes_text(TINY.parameters)
    assert figures["learner: Adam moments, fp32"].value == bytes_text(2 * TINY.parameters)
    assert "4 ranks" in figures["learner: gradients, fp32"].formula
    reference = "learner: reference model, fp32"
    assert figures[reference].value == alone[reference].value
    assert "tokens a step and rank" in figures.keys() - alone.keys()


def test_a_pool_too_large_for_redis_is_named() -> None:
    config = load_config(DEMO, ["schedule.budget.tokens=100000000"])
    figures = {each.name: each for each in arithmetic(config, None)}
    assert "ABOVE redis.maxmemory_bytes" in figures["Redis memory for the pool"].formula


def test_sizes_have_units() -> None:
    assert [bytes_text(n) for n in (12, 2048, 3 << 30, 2 << 40)] == [
        "12 B",
        "2.0 KiB",
        "3.0 GiB",
        "2.0 TiB",
    ]


def test_a_damaged_config_json_gives_no_shape(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    assert read_shape(tmp_path) is None
