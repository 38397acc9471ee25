"""Terms beside the policy loss, over the same tokens and with the same denominators.

None of them is multiplied by the mismatch weight or dropped where IcePop drops a token: they speak
of the policy at that token, not of how the token was sampled (Ring-1T eq. 1: M multiplies the
clipped term only). Each is a sum over tokens, so the sum over micro-batches is that of the batch.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

KlEstimator = Literal["k1", "k2", "k3"]
_MAX_LOG_RATIO = 20.0
"""Of log(pi_ref / pi): from here on exp is its tangent."""


def kl_values(
    policy_logprobs: Tensor, reference_logprobs: Tensor, estimator: KlEstimator
) -> Tensor:
    """Estimates of KL(pi || pi_ref) in nats, one a token, from log-probs of sampled tokens.

    Shape and dtype of ``policy_logprobs``, with its gradient; none to ``reference_logprobs``. With
    d = log pi - log pi_ref: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d (never negative).

    As losses they differ: the gradient of k1 is grad log pi, whose mean over tokens of pi is zero,
    so it says nothing of pi_ref; that of k2 is d grad log pi, whose mean is the gradient of
    KL(pi || pi_ref); that of k3 is (1 - exp(-d)) grad log pi, whose mean is the gradient of
    KL(pi_ref || pi). Where d is below -20, exp goes on as its tangent: no token gives an infinity.

    Source: Schulman, "Approximating KL Divergence" (2020); GRPO uses k3.
    """
    log_ratio = policy_logprobs - reference_logprobs.detach()
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio * log_ratio
    # expm1: near d = 0 the plain difference would lose its digits in float32.
    grown = torch.expm1((-log_ratio).clamp(max=_MAX_LOG_RATIO))
    tangent = (-log_ratio - _MAX_LOG_RATIO).clamp(min=0) * math.exp(_MAX_LOG_RATIO)
    return grown + tangent + log_ratio


def normalized_sum(values: Tensor, inverse_denominators: Tensor, mask: Tensor) -> Tensor:
    """Sum of ``values`` / denominator where ``mask`` is True, a scalar with gradient.

    All share one shape; ``inverse_denominators`` are those of ``policy_loss``. What stands at
    masked positions, NaN included, changes neither the sum nor the gradient.
    """
    zeros = torch.zeros_like(values)
    return (torch.where(mask, values, zeros) * inverse_denominators).sum()


def entropy(logits: Tensor) -> Tensor:
    """Entropy [N] in nats of softmax(``logits`` [N, V]), with gradient when that is enabled."""
    distribution = logits.log_softmax(-1)
    return -(distribution.exp() * distribution).sum(-1)
