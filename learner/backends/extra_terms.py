"""What is added to the policy loss of a micro-batch: KL, entropy, router losses.

With all coefficients 0 nothing is computed and the policy loss is returned as it came.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from learner.algorithms.extra_losses import kl_values, normalized_sum
from learner.backends.collate import MicroBatch
from learner.backends.ranks import Ranks
from learner.backends.reference import ReferencePolicy
from learner.backends.router_terms import RouterOutputs, RouterWatch, real_positions
from ringasync.config.schema import LearnerConfig, LossConfig
from ringasync.errors import NonFiniteLogprobError

TermTotals = defaultdict[str, Tensor]
"""Sums of the terms over the micro-batches of one update, by metric name: float64, on the device,
so that nothing waits for it between micro-batches."""


@dataclass(frozen=True, slots=True, eq=False)
class FixedInputs:
    """What stays the same in all updates of a batch, of one micro-batch.

    ``reference_logprobs`` fp32 [N], None without KL; ``token_share``: its real tokens over those of
    the whole batch.
    """

    reference_logprobs: Tensor | None
    token_share: float


@dataclass(frozen=True, slots=True, eq=False)
class ScoredTokens:
    """A micro-batch and its forward: log-probs and entropy fp32 [N], routers where watched."""

    micro: MicroBatch
    policy_logprobs: Tensor
    entropy: Tensor
    routers: RouterOutputs | None


class ExtraTerms:
    """The terms whose coefficient is not 0."""

    def __init__(
        self,
        model: nn.Module,
        loss: LossConfig,
        prepare: Callable[[nn.Module], None],
        dtype: torch.dtype,
        learner: LearnerConfig,
    ) -> None:
        """``model`` is the starting model, not yet prepared; see ``ReferencePolicy``.

        Raises ``TrainingError`` when router losses are asked for a model without known routers.
        """
        self._loss = loss
        self._reference: ReferencePolicy | None = None
        if loss.kl_coef:
            self._reference = ReferencePolicy(model, prepare, dtype, learner)
        # After the copy: the reference needs no hooks.
        self._routers: RouterWatch | None = None
        if loss.router_balance_coef or loss.router_z_coef:
            self._routers = RouterWatch(model)

    def prepare_batch(
        self,
        micro_batches: Sequence[MicroBatch],
        temperature: float,
        ranks: Ranks | None = None,
        real: Sequence[bool] | None = None,
    ) -> list[FixedInputs]:
        """Score the reference once, and see how much of the batch each micro-batch is.

        ``ranks`` share the batch; ``real`` is False for what only fills a rank up, see
        ``Ranks.share``. Raises ``NonFiniteLogprobError``, on all ranks.
        """
        ranks = ranks or Ranks()
        shares = [0.0] * len(micro_batches)
        if self._routers is not None:
            counts = [int(real_positions(micro).sum()) for micro in micro_batches]
            for index, counted in enumerate(real or ()):
                counts[index] *= counted
            (whole,) = ranks.sum([sum(counts)])
            shares = [count / whole for count in counts]
        problem: NonFiniteLogprobError | None = None
        try:
            fixed = self._fixed_inputs(micro_batches, temperature, shares)
        except NonFiniteLogprobError as error:
            problem = error
        ranks.agree(problem)
        return fixed

    def _fixed_inputs(
        self, micro_batches: Sequence[MicroBatch], temperature: float, shares: Sequence[float]
    ) -> list[FixedInputs]:
        return [
            FixedInputs(
                None if self._reference is None else self._reference.logprobs(micro, temperature),
                share,
            )
            for micro, share in zip(micro_batches, shares, strict=True)
        ]

    def watch(self) -> AbstractContextManager[RouterOutputs | None]:
        """To be held around the forward of a micro-batch."""
        return nullcontext() if self._routers is None else self._routers.watch()

    def add_to(
        self, policy_term: Tensor, scored: ScoredTokens, fixed: FixedInputs, totals: TermTotals
    ) -> Tensor:
        """The whole loss of a micro-batch, a scalar with gradient; its terms go into ``totals``."""
        loss, inverse = self._loss, scored.micro.inverse_denominators
        mask = torch.ones_like(scored.micro.targets, dtype=torch.bool)
        terms: list[tuple[str, float, Tensor]] = []
        if fixed.reference_logprobs is not None:
            values = kl_values(scored.policy_logprobs, fixed.reference_logprobs, loss.kl_estimator)
            terms.append(("kl_reference", loss.kl_coef, normalized_sum(values, inverse, mask)))
        if loss.entropy_coef:
            bonus = normalized_sum(scored.entropy, inverse, mask)
            terms.append(("entropy_bonus", -loss.entropy_coef, bonus))
        if scored.routers is not None:
            balance, z = scored.routers.losses(real_positions(scored.micro))
            terms.append(("router_balance", loss.router_balance_coef, balance * fixed.token_share))
            terms.append(("router_z", loss.router_z_coef, z * fixed.token_share))
        if not terms:
            return policy_term
        whole = policy_term
        totals["loss_policy"] = totals["loss_policy"] + policy_term.detach().double()
        for name, coefficient, value in terms:
            whole = whole + coefficient * value
            totals[name] = totals[name] + value.detach().double()
        return whole

    def move(self, device: torch.device) -> None:
        """Move what is held to ``device``."""
        if self._reference is not None:
            self._reference.move(device)
