"""One micro-batch: its forward, its loss, its backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from learner.algorithms.mismatch import MismatchWeights, log_mismatch_ratio
from learner.algorithms.policy_loss import policy_loss
from learner.backends.collate import MicroBatch
from learner.backends.extra_terms import ExtraTerms, FixedInputs, ScoredTokens, TermTotals
from learner.backends.routing_replay import replayed_routing
from learner.backends.step_timer import StepTimer
from learner.backends.trained import TrainedMicroBatch
from ringasync.config.schema import LossConfig
from ringasync.errors import TrainingError


@dataclass(frozen=True, slots=True, eq=False)
class Accumulation:
    """What adds the gradients of micro-batches up. ``score`` gives log-probs and entropy [N],
    ``backward`` gets a loss and whether it is the last one of the update.

    Nothing in it waits for the device.
    """

    model: nn.Module
    score: Callable[[MicroBatch], tuple[Tensor, Tensor]]
    terms: ExtraTerms
    mismatch: MismatchWeights
    loss: LossConfig
    ranks: int
    backward: Callable[[Tensor, bool], None]

    def add(
        self,
        micro: MicroBatch,
        proximal: Tensor | None,
        fixed: FixedInputs,
        totals: TermTotals,
        timer: StepTimer,
        *,
        is_last: bool,
    ) -> TrainedMicroBatch:
        """Add the gradient of one micro-batch; ``proximal`` fp32 [N], None: its own forward."""
        # Around the backward pass too: checkpointed layers run again in it, by the same routing.
        with replayed_routing(self.model, micro.routed_experts):
            with timer.part("forward"):
                with self.terms.watch() as routers:
                    policy, entropy = self.score(micro)
                anchor = policy.detach() if proximal is None else proximal
                mask = torch.ones_like(micro.targets, dtype=torch.bool)
                weights = self.mismatch.weights(anchor, micro.behavior_logprobs, mask)
                result = policy_loss(
                    policy_logprobs=policy,
                    proximal_logprobs=anchor,
                    advantages=micro.advantages,
                    weights=weights,
                    inverse_denominators=micro.inverse_denominators,
                    mask=mask,
                    clip_low=self.loss.clip_low,
                    clip_high=self.loss.clip_high,
                )
                scored = ScoredTokens(micro, policy, entropy, routers)
                loss = self.terms.add_to(result.loss, scored, fixed, totals)
            with timer.part("backward"):
                # Shards of a gradient are averaged over the ranks; a sum is wanted.
                self.backward(loss * self.ranks, is_last)
        return TrainedMicroBatch(
            loss.detach(),
            policy.detach(),
            log_mismatch_ratio(anchor, micro.behavior_logprobs, mask),
            weights,
            micro.ages,
            result.clipped,
            entropy.detach(),
        )


def backward(loss: Tensor, _is_last: bool) -> None:
    """torch's own."""
    loss.backward()  # type: ignore[no-untyped-call]


def no_step(norm: float) -> TrainingError:
    """What a gradient whose norm is not finite ends in."""
    return TrainingError(
        f"gradient norm is {norm}: the step was not made. Lower learner.lr, or look for a "
        "damaged model with `ringasync audit` and the last checkpoint"
    )
