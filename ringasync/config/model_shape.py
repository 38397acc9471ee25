"""The shape of a Llama- or Qwen-like model: parameters, KV bytes and FLOPs by formula, no torch.

The fields are those of a Hugging Face ``config.json``. What is not one of ``KNOWN_TYPES`` gets no
figures rather than wrong ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringasync.errors import MALFORMED_JSON

KNOWN_TYPES = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe")

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0}
"""Dense bf16 of the SXM cards, by a part of the device's name."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of one model. ``bias``: parameters of biases a layer; ``qk_norm``: norms of q and k."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    tied: bool
    qk_norm: bool = False
    bias: int = 0
    experts: int = 0
    experts_per_token: int = 0
    moe_intermediate: int = 0
    moe_layers: int = 0

    @property
    def attention_matrices(self) -> int:
        """Parameters of q, k, v and o of one layer."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)

    @property
    def parameters(self) -> int:
        """All parameters; a tied LM head is counted once."""
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        layer = self.attention_matrices + norms + self.bias
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return embeddings + self.hidden + self.layers * layer + self._feed_forward(self.experts)

    @property
    def body_matrices_a_token(self) -> int:
        """Parameters of the matrices that one token is multiplied with, the LM head left out."""
        return self.layers * self.attention_matrices + self._feed_forward(self.experts_per_token)

    @property
    def kv_values_a_token(self) -> int:
        """Values of keys and values that one token leaves in the KV cache."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def activation_values_a_token(self) -> int:
        """Values that one layer keeps for its backward, for one token: an estimate.

        Inputs and outputs of both norms, q, k, v, the attention's output, and four vectors of the
        feed-forward network; attention itself is taken to keep no matrix of scores.
        """
        wide = self.intermediate
        if self.moe_layers:
            wide = max(wide if self.moe_layers < self.layers else 0, self._active_width())
        heads = 2 * self.head_dim * (self.heads + self.kv_heads)
        return 4 * self.hidden + heads + 4 * wide

    def _active_width(self) -> int:
        return self.experts_per_token * self.moe_intermediate

    def _feed_forward(self, experts: int) -> int:
        dense = (self.layers - self.moe_layers) * 3 * self.hidden * self.intermediate
        router = self.hidden * self.experts
        moe = self.moe_layers * (router + experts * 3 * self.hidden * self.moe_intermediate)
        return dense + moe


def forward_flops(shape: ModelShape, lengths: Sequence[int], head_tokens: int) -> float:
    """FLOPs of one forward over sequences of ``lengths`` tokens, logits at ``head_tokens`` of them.

    Two a parameter and token; causal attention, in which the token at place i meets i others: 4 x
    heads x head_dim x i a layer. Norms, softmax and rotations are not counted, as is usual.
    """
    tokens = float(sum(lengths))
    met = sum(length * (length + 1) / 2 for length in lengths)
    attention = 4.0 * shape.layers * shape.heads * shape.head_dim * met
    head = 2.0 * shape.vocab * shape.hidden * head_tokens
    return 2.0 * shape.body_matrices_a_token * tokens + attention + head


def train_flops(
    shape: ModelShape, lengths: Sequence[int], head_tokens: int, updates: int = 1
) -> float:
    """FLOPs of training one batch: a forward and a backward of twice that, for each update.

    Above one update the proximal pass is one more forward. What is computed a second time to save
    memory is not counted: that is the M of MFU.
    """
    passes = 3 * updates + (1 if updates > 1 else 0)
    return passes * forward_flops(shape, lengths, head_tokens)


def peak_tflops_of(device_name: str) -> float:
    """Dense bf16 TFLOP/s of a device known by name; 0 for any other."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in device_name), 0.0)


def shape_of(fields: Mapping[str, Any]) -> ModelShape | None:
    """The shape from the fields of a ``config.json``; None where the kind is not known."""
    kind = fields.get("model_type")
    if kind not in KNOWN_TYPES:
        return None
    hidden, layers = int(fields["hidden_size"]), int(fields["num_hidden_layers"])
    heads = int(fields["num_attention_heads"])
    kv_heads = int(fields.get("num_key_value_heads") or heads)
    head_dim = int(fields.get("head_dim") or hidden // heads)
    wide = int(fields["intermediate_size"])
    moe = _moe(fields, kind, layers, wide)
    qkv, attention_bias = head_dim * (heads + 2 * kv_heads), bool(fields.get("attention_bias"))
    bias = qkv if kind == "qwen2" else (qkv + hidden if attention_bias else 0)
    if kind == "llama" and fields.get("mlp_bias"):
        bias += 2 * wide + hidden
    return ModelShape(
        vocab=int(fields["vocab_size"]),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=wide,
        tied=bool(fields.get("tie_word_embeddings", False)),
        qk_norm=kind in ("qwen3", "qwen3_moe"),
        bias=bias,
        **moe,
    )


def read_shape(path: Path) -> ModelShape | None:
    """The shape of a model's folder or ``config.json``; None where there is none, or not known."""
    file = path / "config.json" if path.is_dir() else path
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        return shape_of(fields) if isinstance(fields, dict) else None
    except (OSError, *MALFORMED_JSON):
        return None


def _moe(fields: Mapping[str, Any], kind: str, layers: int, wide: int) -> dict[str, int]:
    if kind not in ("mixtral", "qwen3_moe"):
        return {}
    # Transformers 5 writes the second name for every kind.
    experts = int(fields["num_experts"] if "num_experts" in fields else fields["num_local_experts"])
    if kind == "mixtral":
        width, sparse = wide, layers
    else:
        width = int(fields["moe_intermediate_size"])
        every, dense = int(fields.get("decoder_sparse_step", 1)), fields.get("mlp_only_layers")
        sparse = sum(
            1 for i in range(layers) if i not in (dense or ()) and experts and (i + 1) % every == 0
        )
    return {
        "experts": experts,
        "experts_per_token": int(fields["num_experts_per_tok"]),
        "moe_intermediate": width,
        "moe_layers": sparse,
    }
