"""What one batch says of itself, token by token: mismatch by age, drift, sample size.

Ages are learner steps between the version that sampled a token and the weights before the update.
At age 0 the mismatch is the engines' alone; at a greater age drift of the policy comes on top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

QUANTILES = (0.01, 0.05, 0.5, 0.95, 0.99)
MAX_AGE_BUCKET = 8
"""Ages from here on share one bucket, named ``8+``."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenStats:
    """Trained tokens of one batch, arrays of one length N.

    ``log_ratio`` float64: log k (may be NaN or infinite); ``weights`` float64: mismatch weights;
    ``ages`` int64; ``clipped`` bool: the PPO clip binds; ``entropy`` float64, NaN if not computed.
    """

    log_ratio: npt.NDArray[np.float64]
    weights: npt.NDArray[np.float64]
    ages: npt.NDArray[np.int64]
    clipped: npt.NDArray[np.bool_]
    entropy: npt.NDArray[np.float64]

    @property
    def num_tokens(self) -> int:
        """Length N."""
        return int(self.log_ratio.shape[0])


def empty_stats() -> TokenStats:
    """Stats of no tokens."""
    return concatenate([])


def concatenate(parts: list[TokenStats]) -> TokenStats:
    """Join the stats of micro-batches."""
    return TokenStats(
        np.concatenate([np.zeros(0), *(part.log_ratio for part in parts)]),
        np.concatenate([np.zeros(0), *(part.weights for part in parts)]),
        np.concatenate([np.zeros(0, np.int64), *(part.ages for part in parts)]),
        np.concatenate([np.zeros(0, np.bool_), *(part.clipped for part in parts)]),
        np.concatenate([np.zeros(0), *(part.entropy for part in parts)]),
    )


def effective_sample_share(weights: npt.NDArray[np.float64]) -> float:
    """(sum w)^2 / (N sum w^2): 1 when all weights are equal, 0 when none is left."""
    squares = float((weights * weights).sum())
    if squares == 0.0:
        return 0.0
    return float(weights.sum()) ** 2 / (weights.size * squares)


def age_label(age: int) -> str:
    """Bucket of an age: ``0`` ... ``7``, ``8+``."""
    return f"{MAX_AGE_BUCKET}+" if age >= MAX_AGE_BUCKET else str(age)


def mismatch_report(stats: TokenStats, *, mask_low: float, mask_high: float) -> dict[str, Any]:
    """All mismatch metrics of a batch as plain JSON data; ``{}`` for a batch without tokens.

    ``by_age`` maps an age bucket to tokens, mask rate (share of weight 0), share of tokens below
    and above the band, quantiles of log k, and drift: mean log k there minus at age 0 (absent when
    no token has age 0).
    """
    if stats.num_tokens == 0:
        return {}
    buckets = np.minimum(stats.ages, MAX_AGE_BUCKET)
    by_age = {
        age_label(int(age)): _bucket(stats, buckets == age, mask_low, mask_high)
        for age in np.unique(buckets)
    }
    base = by_age.get("0", {}).get("log_ratio_mean")
    if base is not None:
        for entry in by_age.values():
            if entry["log_ratio_mean"] is not None:
                entry["drift"] = entry["log_ratio_mean"] - base
    whole = _bucket(stats, np.ones(stats.num_tokens, np.bool_), mask_low, mask_high)
    entropy = stats.entropy[np.isfinite(stats.entropy)]
    return {
        "mask_rate": whole["mask_rate"],
        "below_rate": whole["below_rate"],
        "above_rate": whole["above_rate"],
        "log_ratio_quantiles": whole["log_ratio_quantiles"],
        "mask_rate_by_age": {age: entry["mask_rate"] for age, entry in by_age.items()},
        "drift_by_age": {age: entry["drift"] for age, entry in by_age.items() if "drift" in entry},
        "staleness_tokens": {age: entry["tokens"] for age, entry in by_age.items()},
        "staleness_mean": float(stats.ages.mean()),
        "staleness_max": int(stats.ages.max()),
        "by_age": by_age,
        "ess": effective_sample_share(stats.weights),
        "clip_fraction": float(stats.clipped.mean()),
        "entropy": float(entropy.mean()) if entropy.size else None,
        **_gap(stats, stats.ages == 0),
    }


def _bucket(
    stats: TokenStats, chosen: npt.NDArray[np.bool_], mask_low: float, mask_high: float
) -> dict[str, Any]:
    log_ratio = stats.log_ratio[chosen]
    finite = log_ratio[np.isfinite(log_ratio)]
    with np.errstate(divide="ignore"):
        low, high = float(np.log(mask_low)), float(np.log(mask_high))
    tokens = int(chosen.sum())
    return {
        "tokens": tokens,
        "mask_rate": float((stats.weights[chosen] == 0).mean()),
        "below_rate": float((log_ratio < low).sum() / tokens),
        "above_rate": float((log_ratio > high).sum() / tokens),
        "nonfinite_tokens": int(tokens - finite.size),
        "log_ratio_mean": float(finite.mean()) if finite.size else None,
        "log_ratio_quantiles": {
            f"p{round(100 * level):02d}": float(np.quantile(finite, level)) for level in QUANTILES
        }
        if finite.size
        else {},
    }


def _gap(stats: TokenStats, chosen: npt.NDArray[np.bool_]) -> dict[str, float | None]:
    """|log k| at age 0: the log-prob gap between the engines, in nats."""
    gap = np.abs(stats.log_ratio[chosen])
    gap = gap[np.isfinite(gap)]
    if gap.size == 0:
        return {"gap_mean": None, "gap_p99": None, "gap_max": None}
    return {
        "gap_mean": float(gap.mean()),
        "gap_p99": float(np.quantile(gap, 0.99)),
        "gap_max": float(gap.max()),
    }
