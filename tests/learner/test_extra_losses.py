"""KL, entropy and router losses in float64, by hand and by finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from learner.algorithms.extra_losses import KlEstimator, entropy, kl_values, normalized_sum
from learner.algorithms.router_losses import balance_loss, z_loss


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_logits(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def test_kl_by_hand() -> None:
    policy, reference = doubles(math.log(0.5), -1.0), doubles(math.log(0.25), -1.0)
    # d = log 2 and 0
    expected: dict[KlEstimator, float] = {
        "k1": math.log(2),
        "k2": math.log(2) ** 2 / 2,
        "k3": 0.5 - 1 + math.log(2),
    }
    for name, value in expected.items():
        estimate = kl_values(policy, reference, name)
        assert estimate.tolist() == pytest.approx([value, 0.0], abs=1e-15)


def test_kl_gradients_are_those_that_the_docstring_names() -> None:
    reference = doubles(-2.0, -0.5, -3.0)
    expected: dict[KlEstimator, Callable[[float], float]] = {
        "k1": lambda d: 1.0,
        "k2": lambda d: d,
        "k3": lambda d: 1 - math.exp(-d),
    }
    for name, factor in expected.items():
        policy = doubles(-1.0, -1.5, -3.0).requires_grad_()
        total = kl_values(policy, reference, name).sum()
        total.backward()  # type: ignore[no-untyped-call]
        assert policy.grad is not None
        assert policy.grad.tolist() == pytest.approx([factor(d) for d in (1.0, -1.0, 0.0)])
    assert not reference.requires_grad


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_gradcheck(estimator: KlEstimator) -> None:
    policy = doubles(-1.0, -4.0, -30.0, -0.1).requires_grad_()
    reference = doubles(-2.0, -1.0, -2.0, -0.1)
    assert torch.autograd.gradcheck(lambda p: kl_values(p, reference, estimator), (policy,))


def test_k1_and_k3_are_the_kl_in_the_mean() -> None:
    policy, reference = random_logits(9).log_softmax(-1), doubles(*[-math.log(9)] * 9)
    exact = (policy.exp() * (policy - reference)).sum().item()
    names: tuple[KlEstimator, ...] = ("k1", "k3")
    for name in names:
        mean = (policy.exp() * kl_values(policy, reference, name)).sum()
        assert mean.item() == pytest.approx(exact)
    assert bool((kl_values(policy, reference, "k3") >= 0).all())


def test_k3_of_a_token_far_off_is_finite_and_points_back() -> None:
    policy = torch.tensor([-500.0], requires_grad=True)
    value = kl_values(policy, torch.tensor([-1.0]), "k3")
    value.sum().backward()  # type: ignore[no-untyped-call]
    assert bool(torch.isfinite(value).all())
    assert policy.grad is not None
    assert -math.inf < float(policy.grad) < -1e8  # descending makes the token likelier again


def test_normalized_sum_ignores_what_is_masked() -> None:
    values = doubles(1.0, 2.0, math.nan).requires_grad_()
    mask = torch.tensor([True, True, False])
    total = normalized_sum(values, doubles(0.5, 0.25, 1.0), mask)
    total.backward()  # type: ignore[no-untyped-call]
    assert total.item() == 1.0
    assert values.grad is not None
    assert values.grad.tolist() == [0.5, 0.25, 0.0]


def test_entropy_by_hand() -> None:
    logits = torch.stack([doubles(0.0, 0.0, 0.0, 0.0), doubles(math.log(3), 0.0, -800.0, -900.0)])
    mixed = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert entropy(logits).tolist() == pytest.approx([math.log(4), mixed])
    assert torch.autograd.gradcheck(entropy, (random_logits(3, 5),))


def test_balance_loss_by_hand() -> None:
    even, experts = torch.zeros(4, 4, dtype=torch.float64), torch.tensor([[0, 1], [2, 3]] * 2)
    assert float(balance_loss(even, experts)) == pytest.approx(1.0)
    # All tokens to experts 0 and 1, and all probability there: E / K
    sure = doubles(50.0, 50.0, -50.0, -50.0).repeat(4, 1)
    assert float(balance_loss(sure, torch.tensor([[0, 1]] * 4))) == pytest.approx(2.0)
    # P = (3/4, 1/4), F = 2 x (2/3, 1/3): 3/4 x 4/3 + 1/4 x 2/3
    skewed = doubles(math.log(3), 0.0).repeat(3, 1)
    assert float(balance_loss(skewed, torch.tensor([[0], [0], [1]]))) == pytest.approx(7 / 6)


def test_balance_loss_of_one_layer_is_transformers_over_k() -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    logits = random_logits(10, 6)
    mine = balance_loss(logits, logits.topk(2).indices)
    theirs = load_balancing_loss_func((logits,), num_experts=6, top_k=2)
    assert mine.item() == pytest.approx(theirs.item() / 2)


def test_z_loss_by_hand() -> None:
    logits = torch.stack([doubles(0.0, 0.0), doubles(math.log(2), math.log(3))])
    assert float(z_loss(logits)) == pytest.approx((math.log(2) ** 2 + math.log(5) ** 2) / 2)


def test_router_losses_gradcheck() -> None:
    experts = torch.tensor([[0, 1], [1, 4], [3, 1]])
    assert torch.autograd.gradcheck(lambda one: balance_loss(one, experts), (random_logits(3, 5),))
    assert torch.autograd.gradcheck(z_loss, (random_logits(3, 5),))
