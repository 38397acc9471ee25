"""What the backward pass of a micro-batch leaves on the device, to be read after the last one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from learner.algorithms.metrics import TokenStats


@dataclass(frozen=True, slots=True, eq=False)
class TrainedMicroBatch:
    """``loss`` is a scalar, the others are [N]; all detached."""

    loss: Tensor
    policy: Tensor
    log_ratio: Tensor
    weights: Tensor
    ages: Tensor
    clipped: Tensor
    entropy: Tensor

    def stats(self) -> TokenStats:
        """In main memory."""
        return TokenStats(
            _array(self.log_ratio),
            _array(self.weights),
            self.ages.cpu().numpy(),
            self.clipped.cpu().numpy(),
            _array(self.entropy),
        )


def _array(values: Tensor) -> npt.NDArray[np.float64]:
    return values.detach().double().cpu().numpy()
