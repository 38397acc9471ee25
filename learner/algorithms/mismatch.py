"""Weights for the mismatch between train and inference engine: IcePop and its neighbours.

Every variant answers the same question: with what weight does a token's clipped PPO term enter the
loss, given ``proximal_logprobs`` (train engine, theta_old) and ``behavior_logprobs`` (recorded by
the version that sampled the token)? Weights never carry a gradient, are computed from the log ratio
and cut before ``exp``, and are zero where ``mask`` is False whatever stands there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

MismatchName = Literal["icepop", "tis", "kpop", "none"]
_KPOP_EPS = 1e-6
"""p and q are kept this far from 0 and 1: sampled tokens reach exactly 1 in float32."""


class MismatchWeights(Protocol):
    """Turns two log-probs a token into one weight a token."""

    def weights(self, proximal_logprobs: Tensor, behavior_logprobs: Tensor, mask: Tensor) -> Tensor:
        """Weights >= 0, finite, detached; shape and dtype of ``proximal_logprobs``.

        All three share one shape; ``mask`` is bool, True at trained positions.
        """
        ...


def log_mismatch_ratio(
    proximal_logprobs: Tensor, behavior_logprobs: Tensor, mask: Tensor
) -> Tensor:
    """log k = log pi_train(theta_old) - log pi_infer, detached; 0 where ``mask`` is False.

    May be NaN or infinite at trained positions: the variants decide what that means.
    """
    log_ratio = (proximal_logprobs - behavior_logprobs).detach()
    return torch.where(mask, log_ratio, torch.zeros_like(log_ratio))


@dataclass(frozen=True, slots=True)
class IcePop:
    """k inside the closed band [low, high], zero outside and where log k is not finite.

    Source: Ring-1T eq. 1 and 2.
    """

    low: float = 0.5
    high: float = 5.0

    def weights(self, proximal_logprobs: Tensor, behavior_logprobs: Tensor, mask: Tensor) -> Tensor:
        """See ``MismatchWeights.weights``."""
        log_k = log_mismatch_ratio(proximal_logprobs, behavior_logprobs, mask)
        log_low = math.log(self.low) if self.low > 0 else -math.inf
        keep = mask & torch.isfinite(log_k) & (log_k >= log_low) & (log_k <= math.log(self.high))
        return _exp_where(keep, log_k)


@dataclass(frozen=True, slots=True)
class Tis:
    """min(k, cap), no lower bound: truncated importance sampling. NaN has weight zero."""

    cap: float = 2.0

    def weights(self, proximal_logprobs: Tensor, behavior_logprobs: Tensor, mask: Tensor) -> Tensor:
        """See ``MismatchWeights.weights``."""
        log_k = log_mismatch_ratio(proximal_logprobs, behavior_logprobs, mask)
        keep = mask & ~torch.isnan(log_k)
        return _exp_where(keep, log_k.clamp(max=math.log(self.cap)))


@dataclass(frozen=True, slots=True)
class KPop:
    """1 where the Bernoulli KL of the sampled token's probability is <= phi both ways, else 0.

    Source: Ring-2.6 section 3.2.3.
    """

    phi: float = 0.5

    def weights(self, proximal_logprobs: Tensor, behavior_logprobs: Tensor, mask: Tensor) -> Tensor:
        """See ``MismatchWeights.weights``."""
        log_k = log_mismatch_ratio(proximal_logprobs, behavior_logprobs, mask)
        usable = mask & torch.isfinite(log_k)
        train = _probability(proximal_logprobs, usable)
        infer = _probability(behavior_logprobs, usable)
        near = (bernoulli_kl(train, infer) <= self.phi) & (bernoulli_kl(infer, train) <= self.phi)
        return (usable & near).to(proximal_logprobs.dtype)


@dataclass(frozen=True, slots=True)
class NoCorrection:
    """Weight 1 at every trained position: plain GRPO. The behavior log-prob plays no part."""

    def weights(self, proximal_logprobs: Tensor, behavior_logprobs: Tensor, mask: Tensor) -> Tensor:
        """See ``MismatchWeights.weights``."""
        return mask.to(proximal_logprobs.dtype)


def bernoulli_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(Bernoulli(p) || Bernoulli(q)) in nats; p and q must lie strictly between 0 and 1."""
    return p * torch.log(p / q) + (1 - p) * torch.log((1 - p) / (1 - q))


def make_mismatch(
    name: MismatchName, *, mask_low: float, mask_high: float, tis_cap: float, kpop_phi: float
) -> MismatchWeights:
    """Build the variant that ``loss.mismatch`` names."""
    if name == "icepop":
        return IcePop(mask_low, mask_high)
    if name == "tis":
        return Tis(tis_cap)
    if name == "kpop":
        return KPop(kpop_phi)
    return NoCorrection()


def _exp_where(keep: Tensor, log_weight: Tensor) -> Tensor:
    # Cut before exp: exp(inf) * 0 would be NaN.
    safe = torch.where(keep, log_weight, torch.zeros_like(log_weight))
    return torch.where(keep, safe.exp(), torch.zeros_like(safe))


def _probability(logprobs: Tensor, usable: Tensor) -> Tensor:
    safe = torch.where(usable, logprobs.detach(), torch.full_like(logprobs, -1.0))
    return safe.exp().clamp(_KPOP_EPS, 1 - _KPOP_EPS)
