"""What a train engine takes from the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ringasync.config.schema import LearnerConfig, LossConfig


@dataclass(frozen=True, slots=True)
class TorchSettings:
    """What the backend takes from the configuration.

    ``temperature`` is the sampling temperature, applied to the logits of every training log-prob.
    ``dtype`` is the dtype of forward passes and of published weights; the master stays fp32.
    ``head_dtype`` may set the LM head apart: ``float32`` above a body in ``dtype``.
    ``begin_offloaded``: stay in main memory until ``onload``.
    """

    learner: LearnerConfig
    loss: LossConfig
    temperature: float = 1.0
    dtype: torch.dtype = torch.float32
    seed: int = 0
    head_dtype: Literal["model", "float32"] = "model"
    begin_offloaded: bool = False
