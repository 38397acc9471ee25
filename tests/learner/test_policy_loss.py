"""The clipped loss against values worked out by hand in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learner.algorithms.mismatch import IcePop
from learner.algorithms.policy_loss import PolicyLoss, policy_loss, token_denominators

BAD = (math.nan, math.inf, -math.inf)


def f64(*values: float, grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def loss_of(policy: Tensor, **changes: Any) -> PolicyLoss:
    count = policy.shape[0]
    arguments: dict[str, Any] = {
        "policy_logprobs": policy,
        "proximal_logprobs": policy.detach(),
        "advantages": f64(*[1.0] * count),
        "weights": f64(*[1.0] * count),
        "inverse_denominators": f64(*[0.1] * count),
        "mask": torch.ones(count, dtype=torch.bool),
        "clip_low": 0.2,
        "clip_high": 0.3,
    }
    return policy_loss(**{**arguments, **changes})


def test_by_hand() -> None:
    # r = 1.5, 0.5, 1.5, 0.5; A = 1, 1, -1, -1; clip to [0.8, 1.3]
    policy = f64(*(math.log(r) for r in (1.5, 0.5, 1.5, 0.5)), grad=True)
    result = loss_of(
        policy,
        proximal_logprobs=f64(0, 0, 0, 0),
        advantages=f64(1, 1, -1, -1),
        weights=f64(2, 2, 3, 3),
    )
    # min(1.5, 1.3) = 1.3; min(0.5, 0.8) = 0.5; min(-1.5, -1.3) = -1.5; min(-0.5, -0.8) = -0.8
    expected = -(2 * 1.3 + 2 * 0.5 - 3 * 1.5 - 3 * 0.8) / 10
    assert float(result.loss.detach()) == pytest.approx(expected, rel=1e-14)
    assert result.clipped.tolist() == [True, False, False, True]
    result.loss.backward()  # type: ignore[no-untyped-call]
    assert policy.grad is not None
    # -w r A / 10 where the clip does not bind, else 0
    assert policy.grad.tolist() == pytest.approx([0, -0.1, 0.45, 0], rel=1e-12)


def test_one_update_gradient_is_minus_weight_times_advantage() -> None:
    policy = f64(-1.0, -2.0, -3.0, grad=True)
    weights = IcePop().weights(
        policy, f64(-1.5, -1.0, -9.0), torch.ones(3, dtype=torch.bool)
    )  # k = e^0.5, e^-1 (masked), e^6 (masked)
    loss_of(policy, weights=weights, advantages=f64(2, 2, 2)).loss.backward()  # type: ignore[no-untyped-call]
    assert policy.grad is not None
    assert policy.grad.tolist() == pytest.approx([-0.1 * 2 * math.exp(0.5), 0, 0], rel=1e-12)


def test_gradient_through_the_weight_is_zero() -> None:
    behavior = f64(-1.2, -2.2, grad=True)
    policy = f64(-1.0, -2.0, grad=True)
    weights = IcePop().weights(policy, behavior, torch.ones(2, dtype=torch.bool))
    with_tail = weights + 0 * behavior.sum()  # a weight that does carry a gradient is cut as well
    loss_of(policy, weights=with_tail).loss.backward()  # type: ignore[no-untyped-call]
    assert behavior.grad is None
    assert policy.grad is not None
    assert policy.grad.tolist() == pytest.approx([-0.1 * math.exp(0.2)] * 2, rel=1e-12)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("field", ["policy_logprobs", "proximal_logprobs", "advantages", "weights"])
def test_masked_positions_change_nothing(field: str, bad: float) -> None:
    values = f64(-1.0, -2.0, -3.0)
    mask = torch.tensor([True, False, True])
    clean = f64(-1.0, -2.0, -3.0, grad=True)
    expected = loss_of(clean, mask=mask)
    expected.loss.backward()  # type: ignore[no-untyped-call]
    policy = f64(-1.0, bad if field == "policy_logprobs" else -2.0, -3.0, grad=True)
    changes: dict[str, Any] = {"mask": mask, "proximal_logprobs": values}
    if field != "policy_logprobs":
        broken = values.clone() if field == "proximal_logprobs" else f64(1, 1, 1)
        broken[1] = bad
        changes[field] = broken
    got = loss_of(policy, **changes)
    got.loss.backward()  # type: ignore[no-untyped-call]
    assert float(got.loss.detach()) == float(expected.loss.detach())
    assert policy.grad is not None
    assert clean.grad is not None
    assert policy.grad.tolist() == clean.grad.tolist()
    assert policy.grad[1] == 0


@pytest.mark.parametrize("gap", BAD)
def test_gaps_that_are_not_finite_never_make_a_nan_loss(gap: float) -> None:
    policy = f64(-1.0, -2.0, grad=True)
    behavior = f64(gap, -2.0)
    weights = IcePop().weights(policy, behavior, torch.ones(2, dtype=torch.bool))
    result = loss_of(policy, weights=weights, advantages=f64(-1, -1))
    result.loss.backward()  # type: ignore[no-untyped-call]
    assert float(result.loss.detach()) == pytest.approx(0.1)
    assert policy.grad is not None
    assert policy.grad.tolist() == pytest.approx([0, 0.1])


def test_a_huge_importance_ratio_stays_finite() -> None:
    policy = f64(0.0, 0.0, grad=True)
    result = loss_of(policy, proximal_logprobs=f64(-800, -800), advantages=f64(1, -1))
    result.loss.backward()  # type: ignore[no-untyped-call]
    assert math.isfinite(float(result.loss.detach()))
    assert policy.grad is not None
    assert bool(torch.isfinite(policy.grad).all())


def test_denominators() -> None:
    assert token_denominators("budget", budget_tokens=100, sequence_tokens=[3, 0, 50]) == [100] * 3
    assert token_denominators("sequence", budget_tokens=100, sequence_tokens=[3, 0, 50]) == [
        9,
        3,
        150,
    ]


def test_denominator_does_not_change_when_tokens_are_masked() -> None:
    policy = f64(-1.0, -2.0, -3.0, -4.0)
    whole = loss_of(policy)
    masked = loss_of(policy, mask=torch.tensor([True, True, False, False]))
    outside = loss_of(policy, weights=f64(1, 1, 0, 0))
    assert float(whole.loss) == pytest.approx(-0.4)
    assert float(masked.loss) == pytest.approx(-0.2)  # not -0.4: the mean is over all four
    assert float(outside.loss) == pytest.approx(-0.2)


@given(st.lists(st.tuples(st.floats(-5, 0), st.floats(-5, 0), st.floats(-3, 3)), min_size=2))
def test_any_split_sums_to_the_whole(tokens: list[tuple[float, float, float]]) -> None:
    policy, proximal, advantages = (f64(*column) for column in zip(*tokens, strict=True))
    whole = loss_of(policy, proximal_logprobs=proximal, advantages=advantages)
    cut = len(tokens) // 2
    parts = [
        loss_of(policy[part], proximal_logprobs=proximal[part], advantages=advantages[part])
        for part in (slice(0, cut), slice(cut, None))
    ]
    total = sum(float(part.loss) for part in parts)
    assert total == pytest.approx(float(whole.loss), rel=1e-9, abs=1e-9)
