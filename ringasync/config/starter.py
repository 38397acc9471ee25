"""Settings of the starting model that the project builds itself."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from ringasync.config.section import DEVICE_PATTERN, Section


class StarterConfig(Section):
    """The small character-level Qwen3 that the project builds and fine-tunes when none is given.

    It learns two styles of correct solutions: step by step, and the answer straight off, which a
    model of this size seldom gets right. Their mix sets its first reward, whatever the seed.

    ``architecture = "qwen3_moe"`` puts ``num_experts`` experts of ``moe_intermediate_size`` into
    every layer in place of the dense feed-forward network of ``intermediate_size``.
    """

    architecture: Literal["qwen3", "qwen3_moe"] = "qwen3"
    num_experts: int = Field(8, ge=2)
    experts_per_token: int = Field(2, ge=1)
    moe_intermediate_size: int = Field(128, ge=32, multiple_of=32)
    router_aux_loss: float = Field(0.01, ge=0)
    """Weight of the load-balancing loss: without it a fresh router soon uses a few experts only."""
    tie_word_embeddings: bool = True
    """Tied: the LM head is the embedding matrix; a third fewer parameters at the demo's size."""
    hidden_size: int = Field(192, ge=32, multiple_of=32)
    num_layers: int = Field(2, ge=1)
    head_dim: int = Field(32, ge=32)
    num_heads: int = Field(6, ge=1)
    num_kv_heads: int = Field(6, ge=1)
    intermediate_size: int = Field(512, ge=32)
    steps: int = Field(650, ge=1)
    warmup_steps: int = Field(50, ge=1)
    rows: int = Field(16, ge=1)
    row_tokens: int = Field(64, ge=16)
    """Solutions are packed into so many rows of so many tokens a step."""
    muon_lr: float = Field(0.01, gt=0)
    """Matrices are trained by Muon, three times faster here than by Adam."""
    adam_lr: float = Field(5e-3, gt=0)
    """Embeddings and norms are trained by AdamW."""
    short_share: float = Field(0.65, ge=0, le=1)
    """Share of straight-off answers in the last steps: the larger, the lower the first reward."""
    short_share_early: float = Field(0.1, ge=0, le=1)
    early_part: float = Field(0.6, ge=0, le=1)
    """Part of the steps with ``short_share_early``: the steps are learnt first."""
    threads: int = Field(2, ge=1)
    data_workers: int = Field(0, ge=0, le=64)
    """Processes that write the examples ahead of a fast device; 0: between the steps."""
    device: str = Field("auto", pattern=DEVICE_PATTERN)
    """On CUDA forward passes run under bf16 autocast; the master stays float32."""

    @model_validator(mode="after")
    def _enough_experts(self) -> Self:
        if self.architecture == "qwen3_moe" and self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token ({self.experts_per_token}) must not be above num_experts "
                f"({self.num_experts})"
            )
        return self
