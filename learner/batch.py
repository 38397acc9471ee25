"""A training batch: trajectories with frozen advantages, and how much of each one trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ringasync.records.trajectory import Trajectory


@dataclass(frozen=True, slots=True, eq=False)
class BatchItem:
    """One trajectory of a batch; its first ``trained_tokens`` policy tokens train."""

    trajectory: Trajectory
    advantage: float
    trained_tokens: int

    @property
    def trained_mask(self) -> npt.NDArray[np.bool_]:
        """bool [T]: True at the tokens that train."""
        mask = self.trajectory.loss_mask
        return mask & (np.cumsum(mask) <= self.trained_tokens)

    @property
    def scored_tokens(self) -> int:
        """Response tokens up to the last one that trains: what the model must see."""
        trained = np.flatnonzero(self.trained_mask)
        return int(trained[-1]) + 1 if trained.size else 0


@dataclass(frozen=True, slots=True, eq=False)
class TrainBatch:
    """Everything that one learner step trains on, in order; a function of the journal record.

    ``learner_step`` is the number of batches trained before this one. ``ages`` maps policy versions
    to their age in learner steps (metrics only: the maths does not depend on it).
    """

    batch_id: str
    learner_step: int
    budget_tokens: int
    items: tuple[BatchItem, ...]
    ages: Mapping[int, int] = field(default_factory=dict)

    def ages_of(self, versions: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """int64 [N]: the ages of policy versions [N]; 0 where one is not among ``ages``."""
        known = np.array(sorted(self.ages), np.int64)
        if not known.size:
            return np.zeros(versions.shape, np.int64)
        ages = np.array([self.ages[int(one)] for one in known], np.int64)
        at = np.minimum(np.searchsorted(known, versions), known.size - 1)
        return np.where(known[at] == versions, ages[at], 0)

    @property
    def trained_tokens(self) -> int:
        """Policy tokens that train: Phi, or less at the end of the data."""
        return sum(item.trained_tokens for item in self.items)
