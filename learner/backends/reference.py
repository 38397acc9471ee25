"""The reference policy: the starting model, frozen, that a KL term holds the policy to."""

from __future__ import annotations

import copy
from collections.abc import Callable

import structlog
import torch
from torch import Tensor, nn

from learner.backends.collate import MicroBatch
from learner.backends.routing_replay import replayed_routing
from learner.backends.token_scores import TokenScores
from ringasync.config.schema import LearnerConfig


class ReferencePolicy:
    """A copy of the starting model in float32: 4 bytes a parameter where the learner trains.

    Its forwards are those of the policy (same autocast, same head, same replayed routing), so under
    the same weights its log-probs are the policy's bit for bit. It is in no checkpoint: each life
    of the learner begins from the starting model and then loads the newest checkpoint.
    """

    def __init__(
        self,
        starting_model: nn.Module,
        prepare: Callable[[nn.Module], None],
        dtype: torch.dtype,
        learner: LearnerConfig,
    ) -> None:
        """Copy ``starting_model``, which nobody has prepared yet; ``prepare`` is done to the copy
        as it is to the policy."""
        # Not of a prepared model: a copy of its head's closure would use the policy's weight.
        self._model = copy.deepcopy(starting_model).requires_grad_(False)
        prepare(self._model)
        self._scores = TokenScores(
            self._model, dtype, learner.logprob_chunk_tokens, compiled=learner.compile
        )
        size = sum(one.numel() * one.element_size() for one in self._model.parameters())
        structlog.get_logger(__name__).info("reference policy loaded", memory_bytes=size)

    @torch.no_grad()
    def logprobs(self, micro: MicroBatch, temperature: float) -> Tensor:
        """Log-probs fp32 [N] of the trained tokens. Raises ``NonFiniteLogprobError``."""
        with replayed_routing(self._model, micro.routed_experts):
            values, _ = self._scores.score(micro.positions, temperature)
        if (problem := micro.nonfinite(values, "the reference policy")) is not None:
            raise problem
        return values

    def move(self, device: torch.device) -> None:
        """Move the copy to ``device`` in place."""
        self._model.to(device)
