"""Group-normalised advantages (GRPO, as used by Ring-lite and Ring-1T)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def is_flat(rewards: Sequence[float]) -> bool:
    """True when all rewards are the same number, bit for bit (an empty or single group is flat).

    Found from the rewards themselves: sixteen rewards of 0.9 are not flat in float32 once their
    mean is subtracted, and divided by a tiny deviation they would train on noise.
    """
    return all(reward == rewards[0] for reward in rewards)


def group_advantages(
    rewards: Sequence[float], *, divide_by_std: bool = True
) -> npt.NDArray[np.float64]:
    """Advantages float64 [G] of one group's rewards; empty rollouts count like any other.

    ``(R_i - mean) / std`` with the sample's deviation (ddof 1), or ``R_i - mean`` when
    ``divide_by_std`` is off. A flat group and a group of one get exactly zero.

    Raises: ``ValueError`` when a reward is NaN or infinite.
    Source: Ring-lite, A_i = (R_i - mean(R_group)) / std(R_group).
    """
    values = np.asarray(rewards, dtype=np.float64)
    if not bool(np.isfinite(values).all()):
        raise ValueError(f"rewards must be finite numbers, got {list(rewards)}")
    if values.size < 2 or is_flat(rewards):
        return np.zeros(values.shape, dtype=np.float64)
    centred = values - values.mean()
    if not divide_by_std:
        return np.asarray(centred, dtype=np.float64)
    # The scale cancels out; without it the squares of very small deviations would underflow.
    scale = np.abs(centred).max()
    if scale == 0.0:
        return np.zeros(values.shape, dtype=np.float64)
    unit = centred / scale
    deviation = np.sqrt((unit * unit).sum() / (values.size - 1))
    return np.asarray(unit / deviation, dtype=np.float64)
