"""A tiny mixture-of-experts model."""

from __future__ import annotations

from typing import Any

import torch

from .kit import VOCAB


def tiny_moe(seed: int = 0, *, tied: bool = True, **changes: Any) -> Any:
    """A Qwen3-MoE of two layers, four experts, two a token, random weights."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 128,
        "norm_topk_prob": True,
        "initializer_range": 0.2,  # routers that choose clearly
        "tie_word_embeddings": tied,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**settings, **changes}))
