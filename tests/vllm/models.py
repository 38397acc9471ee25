"""Tiny models that vLLM serves on a CPU too: head size 32, all widths divisible by 32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

VOCAB_SIZE = 64
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,  # far from flat, so that a wrong weight shows
}


def write_dense(folder: Path, *, seed: int, tied: bool) -> Path:
    """A random two-layer Qwen3."""
    torch.manual_seed(seed)
    Qwen3ForCausalLM(Qwen3Config(**_SHAPE, tie_word_embeddings=tied)).save_pretrained(folder)
    return folder


def write_moe(folder: Path, *, seed: int, tied: bool = False) -> Path:
    """A random two-layer Qwen3-MoE of eight experts, two of them chosen."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        **_SHAPE,
        tie_word_embeddings=tied,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        norm_topk_prob=True,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder
