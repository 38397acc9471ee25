"""Parameters that ZeRO-3 keeps in shards; loads DeepSpeed only where there are any."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def is_zero_shard(tensor: Tensor) -> bool:
    """Whether it is a parameter of ZeRO-3, which is empty but where it is gathered."""
    return hasattr(tensor, "ds_id")


def whole_shape(tensor: Tensor) -> torch.Size:
    """Its shape where it is whole."""
    shape: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return shape


def gathered(tensor: Tensor, *, modifier_rank: int | None = None) -> AbstractContextManager[Any]:
    """Within it ``tensor`` is whole; all ranks must ask. What ``modifier_rank`` writes to it goes
    to all ranks at the end, and nothing else may be written."""
    if not is_zero_shard(tensor):
        return nullcontext()
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    context: AbstractContextManager[Any] = GatheredParameters([tensor], modifier_rank=modifier_rank)
    return context
