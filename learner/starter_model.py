"""The starter's network and its optimizers: Muon for matrices, AdamW for the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from learner.starter_tokenizer import END, PAD, SPECIAL
from ringasync.config.schema import StarterConfig

_MOMENTUM = 0.95
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration, those of ``torch.optim.Muon``."""
_NEWTON_SCHULZ_STEPS = 5


def model_fields(settings: StarterConfig, vocab_size: int) -> dict[str, Any]:
    """What a ``config.json`` of the starter says of the network, ``model_type`` aside."""
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": settings.hidden_size,
        "intermediate_size": settings.intermediate_size,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": settings.num_heads,
        "num_key_value_heads": settings.num_kv_heads,
        "head_dim": settings.head_dim,
        "tie_word_embeddings": settings.tie_word_embeddings,
        "pad_token_id": SPECIAL.index(PAD),
        "eos_token_id": SPECIAL.index(END),
        "bos_token_id": None,
    }
    if settings.architecture == "qwen3":
        return common
    return common | {
        "num_experts": settings.num_experts,
        "num_experts_per_tok": settings.experts_per_token,
        "moe_intermediate_size": settings.moe_intermediate_size,
        "norm_topk_prob": True,  # as in the released Qwen3-MoE models
        "router_aux_loss_coef": settings.router_aux_loss,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def build_model(settings: StarterConfig, vocab_size: int, window_tokens: int) -> Any:
    """A fresh fp32 Qwen3 or Qwen3-MoE."""
    from transformers import (
        Qwen3Config,
        Qwen3ForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    fields = model_fields(settings, vocab_size) | {"max_position_embeddings": window_tokens}
    if settings.architecture == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**fields))
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**fields))


def build_optimizers(model: Any, settings: StarterConfig) -> list[torch.optim.Optimizer]:
    """Muon for matrices, its batched form for stacks of expert matrices, AdamW for the others.

    On a CPU the batched form does all matrices: ``torch.optim.Muon`` multiplies in bfloat16, which
    processors without bf16 instructions (AVX2 only: most laptops) do some twenty times slower.

    Routers are with the others: Muon gives every direction of a matrix the same step, and a router
    of few rows then moves too fast for the experts to follow.
    """
    matrices: list[torch.nn.Parameter] = []
    experts: list[tuple[torch.nn.Parameter, int]] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 and ".experts." in name:
            experts.append((parameter, 2 if name.endswith("gate_up_proj") else 1))
        elif parameter.ndim == 2 and not any(
            part in name for part in ("embed", "lm_head", ".gate.")
        ):
            matrices.append(parameter)
        else:
            others.append(parameter)
    lr, momentum = settings.muon_lr, _MOMENTUM
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=settings.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    if matrices[0].is_cuda:
        optimizers.append(torch.optim.Muon(matrices, lr=lr, momentum=momentum, weight_decay=0.0))
    else:
        experts += [(matrix, 1) for matrix in matrices]
    if experts:
        optimizers.append(StackedMuon(experts, lr=lr, momentum=momentum))
    return optimizers


class StackedMuon(torch.optim.Optimizer):
    """Muon for stacks of matrices [E, rows, columns], or single ones: as ``torch.optim.Muon``.

    That takes single matrices only, and experts are stored fused: all of a layer in
    one parameter, gate and up projection one below the other. The second item of an entry says of
    how many matrices of equal height a slice consists; each of them is orthogonalised by itself.
    """

    def __init__(
        self, stacks: Iterable[tuple[torch.nn.Parameter, int]], *, lr: float, momentum: float
    ) -> None:
        groups = [{"params": [parameter], "parts": parts} for parameter, parts in stacks]
        super().__init__(groups, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update. ``closure`` is not supported."""
        alike: dict[tuple[int, int], list[_Move]] = defaultdict(list)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    move = self._move(parameter, group)
                    alike[move.matrices.shape[1], move.matrices.shape[2]].append(move)
        # Matrices of one shape in one go: many small products use a CPU's cores badly.
        for (rows, width), moves in alike.items():
            directions = orthogonalize(torch.cat([move.matrices for move in moves]))
            scale = max(1.0, rows / width) ** 0.5
            counts = [move.matrices.shape[0] for move in moves]
            for move, direction in zip(moves, torch.split(directions, counts), strict=True):
                move.parameter.add_(
                    direction.reshape(move.parameter.shape), alpha=-move.learning_rate * scale
                )

    def _move(self, parameter: torch.nn.Parameter, group: dict[str, Any]) -> _Move:
        gradient, momentum = parameter.grad, group["momentum"]
        assert gradient is not None  # noqa: S101  for the type checker
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer = state["momentum_buffer"]
        buffer.lerp_(gradient, 1 - momentum)
        update = gradient.lerp(buffer, momentum)  # Nesterov
        height, width = update.shape[-2:]
        matrices = update.reshape(-1, height // group["parts"], width)
        return _Move(parameter, matrices, float(group["lr"]))


@dataclass(frozen=True, slots=True)
class _Move:
    """A parameter and the matrices [N, rows, width] that it is to be moved along."""

    parameter: torch.nn.Parameter
    matrices: Tensor
    learning_rate: float


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest orthogonal matrices of a batch [N, rows, columns], roughly: five steps of the
    quintic Newton-Schulz iteration. Same shape.

    In bfloat16 on a GPU, as ``torch.optim.Muon``; in float32 on a CPU, where bfloat16 products
    are emulated on many machines and then tens of times slower.
    """
    a, b, c = _NEWTON_SCHULZ
    wide = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    is_tall = wide.shape[1] > wide.shape[2]
    if is_tall:
        wide = wide.mT
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.mT if is_tall else wide


def learning_rates(optimizers: Sequence[torch.optim.Optimizer]) -> list[list[float]]:
    """The rates of all parameter groups, optimizer by optimizer."""
    return [[float(group["lr"]) for group in each.param_groups] for each in optimizers]
