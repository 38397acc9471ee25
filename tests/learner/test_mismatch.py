"""Mismatch weights against values worked out by hand in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learner.algorithms.mismatch import (
    IcePop,
    KPop,
    MismatchName,
    MismatchWeights,
    NoCorrection,
    Tis,
    bernoulli_kl,
    make_mismatch,
)

NAMES: tuple[MismatchName, ...] = ("icepop", "tis", "kpop", "none")
INF = math.inf
DEFAULTS = {"mask_low": 0.5, "mask_high": 5.0, "tis_cap": 2.0, "kpop_phi": 0.5}


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def at_ratio(*ratios: float) -> tuple[Tensor, Tensor]:
    """Log-probs whose difference is log k exactly (behavior log-prob 0)."""
    return f64(*(math.log(k) for k in ratios)), f64(*(0.0 for _ in ratios))


def weigh(variant: MismatchWeights, proximal: Tensor, behavior: Tensor) -> list[float]:
    mask = torch.ones_like(proximal, dtype=torch.bool)
    return [float(one) for one in variant.weights(proximal, behavior, mask)]


def test_icepop_band_is_closed_and_weighs_by_k() -> None:
    below, above = math.nextafter(0.5, 0) - 1e-15, math.nextafter(5.0, 9) + 1e-14
    got = weigh(IcePop(0.5, 5.0), *at_ratio(0.4, below, 0.5, 0.50001, 1.0, 3.0, 5.0, above, 9.0))
    assert got == pytest.approx([0, 0, 0.5, 0.50001, 1.0, 3.0, 5.0, 0, 0], rel=1e-12)


def test_icepop_band_is_closed_in_float32_too() -> None:
    proximal = torch.tensor([math.log(0.5), math.log(5.0)], dtype=torch.float32)
    assert weigh(IcePop(0.5, 5.0), proximal, torch.zeros(2)) == pytest.approx([0.5, 5.0])


def test_icepop_agrees_with_verl() -> None:
    # verl's own unit test of rollout_is="0.5_5.0"
    got = weigh(IcePop(0.5, 5.0), f64(-1, -1, -1), f64(-0.5, -3.5, -0.8))
    assert got == pytest.approx([0.6065, 0.0, 0.8187], abs=5e-5)


def test_icepop_without_lower_end() -> None:
    got = weigh(IcePop(0.0, 5.0), f64(-50.0, -INF, 0.0), f64(0.0, 0.0, 0.0))
    assert got == pytest.approx([math.exp(-50), 0.0, 1.0])


def test_tis_caps_above_only() -> None:
    assert weigh(Tis(2.0), *at_ratio(0.01, 1.0, 2.0, 7.0)) == pytest.approx([0.01, 1.0, 2.0, 2.0])


def test_kpop_by_hand() -> None:
    train, infer = 0.9, 0.5
    forward = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    backward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(5)
    assert float(bernoulli_kl(f64(train), f64(infer))) == pytest.approx(forward)
    assert forward < backward
    pair = f64(math.log(train)), f64(math.log(infer))
    assert weigh(KPop(backward + 1e-9), *pair) == [1.0]
    assert weigh(KPop(backward - 1e-9), *pair) == [0.0]
    assert weigh(KPop(forward + 1e-9), *pair[::-1]) == [0.0]


def test_kpop_keeps_certain_tokens() -> None:
    assert weigh(KPop(0.5), f64(0.0, 1e-9, -40.0), f64(0.0, 0.0, -40.0)) == [1.0, 1.0, 1.0]


def test_none_is_one_everywhere() -> None:
    assert weigh(NoCorrection(), f64(-1, -9), f64(-9, math.nan)) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("icepop", [0, 0, 0]), ("kpop", [0, 0, 0]), ("tis", [2.0, 0, 0]), ("none", [1, 1, 1])],
)
def test_gaps_that_are_not_finite(name: MismatchName, expected: list[float]) -> None:
    # log k = +inf, -inf, NaN
    variant = make_mismatch(name, **DEFAULTS)
    assert weigh(variant, f64(-1, -1, -1), f64(-INF, INF, math.nan)) == expected


@pytest.mark.parametrize("name", NAMES)
def test_weights_carry_no_gradient(name: MismatchName) -> None:
    proximal = torch.tensor([-1.0, -2.0], requires_grad=True)
    weights = make_mismatch(name, **DEFAULTS).weights(
        proximal, torch.tensor([-1.1, -2.1]), torch.tensor([True, True])
    )
    assert not weights.requires_grad
    assert weights.dtype == proximal.dtype


@pytest.mark.parametrize("name", NAMES)
@given(
    values=st.lists(
        st.tuples(
            st.floats(width=32, allow_nan=True),
            st.floats(width=32, allow_nan=True),
            st.booleans(),
        ),
        min_size=1,
        max_size=20,
    )
)
def test_always_finite_and_zero_at_masked_positions(
    name: MismatchName, values: list[tuple[float, float, bool]]
) -> None:
    proximal = torch.tensor([one[0] for one in values])
    behavior = torch.tensor([one[1] for one in values])
    mask = torch.tensor([one[2] for one in values])
    weights = make_mismatch(name, **DEFAULTS).weights(proximal, behavior, mask)
    assert bool(torch.isfinite(weights).all())
    assert bool((weights >= 0).all())
    assert not bool(weights[~mask].any())
    clean = make_mismatch(name, **DEFAULTS).weights(
        torch.where(mask, proximal, 0.0), torch.where(mask, behavior, 0.0), mask
    )
    assert torch.equal(weights, clean)
