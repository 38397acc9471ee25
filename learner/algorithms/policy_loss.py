"""The clipped policy loss under mismatch weights, with denominators that never move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Normalizer = Literal["budget", "sequence"]
_MAX_LOG_RATIO = 20.0
"""|log(pi_theta / pi_old)| is held to this before exp, so that no advantage meets an infinity."""


@dataclass(frozen=True, slots=True, eq=False)
class PolicyLoss:
    """``loss`` is a scalar with gradient; the others are detached, shaped like the tokens.

    ``weights`` are the mismatch weights, ``clipped`` is True where the PPO clip binds.
    """

    loss: Tensor
    weights: Tensor
    clipped: Tensor


def policy_loss(
    *,
    policy_logprobs: Tensor,
    proximal_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    inverse_denominators: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
) -> PolicyLoss:
    """-sum over trained tokens of weight * min(r A, clip(r, 1 - low, 1 + high) A) / denominator.

    All tensors share one shape ([N] or [B, L]): ``policy_logprobs`` with gradient (theta),
    ``proximal_logprobs`` (theta_old), ``advantages``, ``weights`` from ``mismatch``,
    ``inverse_denominators`` from ``token_denominators``, ``mask`` bool. Summing the losses of any
    split of a batch gives the loss of the whole. What stands at masked or weightless positions, NaN
    and infinity included, changes neither loss nor gradient.

    Source: Ring-1T eq. 1 (the weight multiplies after the clip), Ring-lite eq. 2 (1/Phi).
    """
    weights = weights.detach()
    active = mask & (weights != 0)
    zeros = torch.zeros_like(policy_logprobs)
    log_ratio = torch.where(active, policy_logprobs - proximal_logprobs.detach(), zeros)
    ratio = log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    advantage = torch.where(active, advantages, zeros)
    plain = ratio * advantage
    bounded = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantage
    scale = torch.where(active, weights * inverse_denominators, zeros)
    loss = -(scale * torch.minimum(plain, bounded)).sum()
    return PolicyLoss(loss, weights, (active & (bounded < plain)).detach())


def token_denominators(
    normalizer: Normalizer, *, budget_tokens: int, sequence_tokens: Sequence[int]
) -> list[float]:
    """What each token of trajectory i is divided by, one number a trajectory of the batch.

    ``budget``: Phi for all (Ring-lite eq. 2), also for a batch below Phi. ``sequence``: N x |y_i|
    with N the trajectories of the batch and |y_i| the policy tokens of the whole response (Ring-1T
    eq. 1 over several groups). Neither depends on what is masked or cut.
    """
    if normalizer == "budget":
        return [float(budget_tokens)] * len(sequence_tokens)
    count = len(sequence_tokens)
    return [float(count * max(1, length)) for length in sequence_tokens]
