"""Believing a swap: compare live weights with the manifest, then compare answers. Pure.

Two checks, because each sees what the other cannot. *Read-back* compares digests of the engine's
live parameters with the manifest: it catches swaps that were not applied or only partly. The
*probe* scores on-policy tokens and looks at the gap to the learner's log-probs: it catches weights
that are right and answers that are wrong (a stale cache, a broken kernel).
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ringasync.errors import CanaryError
from ringasync.records.weights import WeightManifest

_NAMED_PROBLEMS = 5


def compare_read_back(manifest: WeightManifest, digests: Mapping[str, str]) -> list[str]:
    """Sentences on every published tensor that the engine lacks or holds with other bytes.

    ``digests`` maps HF names to xxh3_128 hex of the live parameters in the published dtype. Names
    that were not published (tied copies, buffers) are ignored. An empty list means equal.
    """
    missing = [tensor.name for tensor in manifest.tensors if tensor.name not in digests]
    differing = [
        tensor.name
        for tensor in manifest.tensors
        if tensor.name in digests and digests[tensor.name] != tensor.digest
    ]
    total, version = len(manifest.tensors), manifest.policy_version
    problems = []
    if missing:
        problems.append(
            f"{len(missing)} of {total} tensors of version {version} are not in the engine: "
            f"{_some(missing)}"
        )
    if differing:
        problems.append(
            f"{len(differing)} of {total} live tensors differ from version {version}: "
            f"{_some(differing)}"
        )
    return problems


def probe_gaps(
    manifest: WeightManifest, scores: Sequence[npt.NDArray[np.float32]]
) -> npt.NDArray[np.float64]:
    """|engine log-prob - learner log-prob| of every probe token, in nats, flat [N].

    ``scores`` are the engine's, one array [T] for each sequence of ``manifest.probe``, in order.
    Raises ``CanaryError`` when counts disagree: then the engine scored something else.
    """
    if len(scores) != len(manifest.probe):
        raise CanaryError(f"engine scored {len(scores)} probe sequences, not {len(manifest.probe)}")
    gaps = []
    for index, (sequence, score) in enumerate(zip(manifest.probe, scores, strict=True)):
        expected = np.asarray(sequence.logprobs, dtype=np.float64)
        if score.shape != expected.shape:
            raise CanaryError(
                f"engine gave {score.shape} log-probs for probe sequence {index}, "
                f"expected {expected.shape}"
            )
        gaps.append(np.abs(score.astype(np.float64) - expected))
    return np.concatenate(gaps) if gaps else np.zeros(0)


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """One probe: gaps and their limits in nats. ``problem`` is empty when it was accepted."""

    gap_mean: float
    gap_p99: float
    limit_mean: float
    limit_p99: float
    num_tokens: int
    problem: str = ""

    @property
    def accepted(self) -> bool:
        """Whether tokens sampled under these weights may be flushed."""
        return not self.problem


class ProbeGate:
    """Accepts or refuses probes: mean or p99 above max(floor, 3 x median of accepted ones) fails.

    The first load calibrates: nothing was swapped, so its gap is what this engine's arithmetic is
    worth, and it is held only to ``first_ceiling`` (mean, nats; larger means another model).
    The maximum is reported by nobody and gated by nobody: mixture-of-experts engines differ by 10
    nats and more on single tokens without being wrong.
    """

    def __init__(
        self,
        floor_mean: float,
        floor_p99: float,
        *,
        factor: float = 3.0,
        first_ceiling: float = 0.5,
        window: int = 64,
    ) -> None:
        self._floors = (floor_mean, floor_p99)
        self._factor = factor
        self._first_ceiling = first_ceiling
        self._means: deque[float] = deque(maxlen=window)
        self._p99s: deque[float] = deque(maxlen=window)

    def check(self, gaps: npt.NDArray[np.float64]) -> ProbeResult:
        """Judge the gaps [N] of one load, and learn from them when they are accepted.

        No tokens, or one that is not finite, is refused.
        """
        limit_mean, limit_p99 = self._limits()
        if gaps.size == 0:
            return ProbeResult(0.0, 0.0, limit_mean, limit_p99, 0, "the probe has no tokens")
        if not bool(np.isfinite(gaps).all()):
            bad = int((~np.isfinite(gaps)).sum())
            problem = f"{bad} of {gaps.size} probe tokens have a log-prob that is not finite"
            return ProbeResult(
                float("inf"), float("inf"), limit_mean, limit_p99, gaps.size, problem
            )
        mean, p99 = float(gaps.mean()), float(np.quantile(gaps, 0.99))
        problem = _above("mean", mean, limit_mean) or _above("99th percentile", p99, limit_p99)
        if not problem:
            self._means.append(mean)
            self._p99s.append(p99)
        return ProbeResult(mean, p99, limit_mean, limit_p99, gaps.size, problem)

    def _limits(self) -> tuple[float, float]:
        if not self._means:
            return max(self._floors[0], self._first_ceiling), float("inf")
        return (
            max(self._floors[0], self._factor * statistics.median(self._means)),
            max(self._floors[1], self._factor * statistics.median(self._p99s)),
        )


def _above(what: str, value: float, limit: float) -> str:
    if value <= limit:
        return ""
    return f"{what} log-prob gap of the probe is {value:.3g} nats, above the limit {limit:.3g}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED_PROBLEMS} more" if len(names) > _NAMED_PROBLEMS else ""
    return ", ".join(names[:_NAMED_PROBLEMS]) + more
