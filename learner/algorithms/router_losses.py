"""Auxiliary losses of mixture-of-experts routers, for one layer.

Shape legend: T tokens, E experts, K experts a token. The caller leaves padding out.
Source: Ring-lite, B = (1/N_e) sum P_i F_i N_e and Z = (1/M) sum (log sum_x exp z_x)^2.
"""

from __future__ import annotations

import torch
from torch import Tensor


def balance_loss(logits: Tensor, experts: Tensor) -> Tensor:
    """sum_i P_i F_i: 1 when all experts have the same share, E / K when K of them have all.

    ``logits`` [T, E] with gradient, T above 0; ``experts`` int64 [T, K], the chosen ones. P_i is
    the mean of softmax(logits) at i. F_i is the load of expert i over an even one: its choices
    times E / (K T), without gradient. That is the reading of the printed formula under which its
    two factors N_e cancel; it is Switch's and DeepSeek's loss, and 1/K of transformers'
    ``load_balancing_loss_func``. A product of two means, so it is not additive over parts of T.
    """
    tokens, count = logits.shape
    share = logits.softmax(-1).mean(0)
    chosen = torch.bincount(experts.flatten(), minlength=count).to(logits.dtype)
    load = chosen * count / (experts.shape[1] * tokens)
    return (share * load).sum()


def z_loss(logits: Tensor) -> Tensor:
    """Mean over tokens of (log sum exp logits)^2; ``logits`` [T, E] with gradient, T above 0."""
    return logits.logsumexp(-1).square().mean()
