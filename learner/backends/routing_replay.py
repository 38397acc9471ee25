"""Routing replay: a training forward through the experts that the inference engine chose.

Train and inference engine choose different experts for some tokens, from the first MoE layer on,
because near-ties fall differently under other kernels; that is the largest part of the mismatch of
MoE models. With replay only *which* experts run comes from the engine. Their weights are computed
from the learner's own router logits, so the router is trained as ever.

Shape legend: B rows, T padded positions, L layers, K experts a token, E experts a layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from ringasync.errors import TrainingError
from ringasync.records.routing import RoutedRows, signed_rows

UNKNOWN = -1
"""Stands where the engine's choice is not known; the model then routes that token itself."""


@dataclass(slots=True)
class RoutingRecord:
    """The choices of one forward, filled while ``recorded_routing`` is open."""

    layers: list[Tensor] = field(default_factory=list)

    def experts(self, rows: int) -> Tensor:
        """int64 [B, T, L, K]; ``rows`` is B."""
        stacked = torch.stack(self.layers, dim=1)
        return stacked.reshape(rows, -1, *stacked.shape[1:])


def pad_routing(routings: Sequence[RoutedRows | None], width: int) -> npt.NDArray[np.int32] | None:
    """int32 [B, width, L, K] from rows [R_i, L, K] by input position (``records.routing``).

    They are cut or filled with ``UNKNOWN`` on the right, as is a sequence without any; None when no
    sequence has some. Raises ``TrainingError`` when sequences differ in L or K.
    """
    shapes = sorted({one.shape[1:] for one in routings if one is not None})
    if not shapes:
        return None
    if len(shapes) > 1:
        raise TrainingError(f"routed experts of one batch differ in shape [L, K]: {shapes}")
    padded = np.full((len(routings), width, *shapes[0]), UNKNOWN, np.int32)
    for row, one in enumerate(routings):
        if one is not None:
            padded[row, : one.shape[0]] = signed_rows(one[:width])
    return padded


def require_routers(model: nn.Module) -> None:
    """Raise ``TrainingError`` unless the routing of ``model`` can be replayed."""
    try:
        find_routers(model)
    except TrainingError as error:
        raise TrainingError(f"loss.routing_replay = true: {error}; set it to false") from None


@contextmanager
def replayed_routing(model: nn.Module, experts: Tensor | None) -> Iterator[None]:
    """Within it, forwards of ``model`` on input ids [B, T] use ``experts``, integers [B, T, L, K];
    with None they are as ever.

    L counts the model's MoE layers, or all its layers. A token and layer with any ``UNKNOWN`` is
    routed by the model. The backward pass may come after the block, unless activations are
    checkpointed: then a recomputed forward needs the same routing and has to be inside.

    Raises:
        TrainingError: a model whose routers are not known here, or a choice that is none of its.
    """
    if experts is None:
        yield
        return
    routers = find_routers(model)
    chosen = experts.to(device=next(model.parameters()).device, dtype=torch.int64)
    columns = _columns(routers, chosen, model)
    # Columns of dense layers say nothing: vLLM leaves zeros there.
    _check(chosen[:, :, columns], next(iter(routers.values())))
    handles = [
        router.register_forward_hook(partial(_replay, chosen[:, :, column].flatten(0, 1)))
        for router, column in zip(routers.values(), columns, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recorded_routing(model: nn.Module) -> Iterator[RoutingRecord]:
    """Records which experts the one forward made within it uses, layer by layer."""
    record = RoutingRecord()

    def keep(_router: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        record.layers.append(output[2].detach())

    handles = [router.register_forward_hook(keep) for router in find_routers(model).values()]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def _replay(
    chosen: Tensor, router: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """A router's output (logits, weights, experts) with the experts ``chosen`` [B * T, K]."""
    logits, own_weights, own = output
    if chosen.shape[0] != own.shape[0]:
        raise TrainingError(
            f"the routing to replay is of {chosen.shape[0]} tokens, this forward has {own.shape[0]}"
        )
    known = (chosen != UNKNOWN).all(dim=-1, keepdim=True)
    experts = torch.where(known, chosen, own)
    # Computed again rather than taken from ``logits``: some versions return probabilities there.
    scores = functional.linear(inputs[0].reshape(-1, router.hidden_dim), router.weight)
    weights = scores.softmax(dim=-1, dtype=torch.float32).gather(-1, experts)
    if router.norm_topk_prob:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return logits, weights.to(own_weights.dtype), experts


def find_routers(model: nn.Module) -> dict[int, Any]:
    """Routers by layer number, in order. Raises ``TrainingError`` when none is known."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    found: dict[int, Any] = {}
    for name, module in model.named_modules():
        layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
        if isinstance(module, Qwen3MoeTopKRouter) and layer:
            found[int(layer.group(1))] = module
    if not found:
        raise TrainingError(
            f"only routers of Qwen3-MoE are known here, and {type(model).__name__} has none"
        )
    return found


def _columns(routers: dict[int, Any], chosen: Tensor, model: Any) -> list[int]:
    """Which of the L columns belongs to which router."""
    if chosen.ndim != 4:
        raise TrainingError(f"routed experts must be [B, T, L, K], not {list(chosen.shape)}")
    if chosen.shape[2] == len(routers):
        return list(range(len(routers)))
    if chosen.shape[2] == model.config.num_hidden_layers:
        return list(routers)
    raise TrainingError(
        f"routed experts are of {chosen.shape[2]} layers; the model has {len(routers)} MoE layers "
        f"and {model.config.num_hidden_layers} in all"
    )


def _check(chosen: Tensor, router: Any) -> None:
    if chosen.shape[3] != router.top_k:
        raise TrainingError(
            f"routed experts are {chosen.shape[3]} a token, the model takes {router.top_k}"
        )
    low, high = int(chosen.min()), int(chosen.max())
    if low < UNKNOWN or high >= router.num_experts:
        raise TrainingError(
            f"routed experts reach from {low} to {high}; the model has 0 to "
            f"{router.num_experts - 1}, and {UNKNOWN} where the choice is not known"
        )
    ordered = chosen.sort(dim=-1).values
    if bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] != UNKNOWN)).any()):
        raise TrainingError("routed experts name an expert twice for one token")
