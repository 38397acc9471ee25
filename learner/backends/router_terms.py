"""Router losses of one forward: which tokens count, what each layer's router said.

Shape legend: B rows, L padded length, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from learner.algorithms.router_losses import balance_loss, z_loss
from learner.backends.collate import MicroBatch
from learner.backends.routing_replay import find_routers
from ringasync.errors import TrainingError


@dataclass(slots=True)
class RouterOutputs:
    """Of one forward, layer by layer: logits fp32 [B * L, E] with gradient, and the router's own
    choice int64 [B * L, K], also where another one was replayed."""

    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def losses(self, real: Tensor) -> tuple[Tensor, Tensor]:
        """Balance and z loss over the tokens where ``real`` bool [B, L], each a mean of layers."""
        chosen = real.flatten()
        parts = [(logits[chosen], experts[chosen]) for logits, experts in self.layers]
        balance = torch.stack([balance_loss(*part) for part in parts]).mean()
        return balance, torch.stack([z_loss(logits) for logits, _ in parts]).mean()


class RouterWatch:
    """Hooks on all routers of a model, for as long as it lives.

    They compute in each forward with gradient, watched or not: a forward that is run again for
    checkpointed activations has to do just what the first one did.
    """

    def __init__(self, model: nn.Module) -> None:
        """Raises ``TrainingError`` for a model whose routers are not known here."""
        self._open: RouterOutputs | None = None
        try:
            routers = find_routers(model)
        except TrainingError as error:
            raise TrainingError(
                f"loss.router_balance_coef, loss.router_z_coef: {error}; set them to 0"
            ) from None
        for router in routers.values():
            router.register_forward_hook(self._keep)

    @contextmanager
    def watch(self) -> Iterator[RouterOutputs]:
        """What the routers say in the one forward made within it."""
        self._open = RouterOutputs()
        try:
            yield self._open
        finally:
            self._open = None

    def _keep(self, router: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        if not torch.is_grad_enabled():
            return
        hidden = inputs[0].reshape(-1, router.hidden_dim)
        # Not the router's own output: some versions return probabilities there, and bfloat16 would
        # blur the square of a log-sum-exp.
        with torch.autocast(hidden.device.type, enabled=False):
            logits = functional.linear(hidden.float(), router.weight.float())
        if self._open is not None:
            self._open.layers.append((logits, output[2].detach()))


def real_positions(micro: MicroBatch) -> Tensor:
    """bool [B, L], True up to the last trained token of each row: what is not padding."""
    rows, width = micro.input_ids.shape
    if micro.packing is not None:
        return torch.ones_like(micro.input_ids, dtype=torch.bool)
    last = torch.zeros(rows, dtype=torch.int64, device=micro.columns.device)
    # A token stands one position behind that which predicts it.
    last = last.scatter_reduce(0, micro.rows, micro.columns + 1, "amax")
    return torch.arange(width, device=last.device)[None] <= last[:, None]
