"""Fused experts under autocast.

transformers keeps the experts of a layer in two 3-D parameters and multiplies them by
``grouped_mm``, which autocast does not know: with a float32 master it would run all experts in
float32, many times slower on a GPU and unlike the inference engine, which runs them in bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_NAME = "ringasync_grouped_mm"


def use_autocast_experts(model: nn.Module) -> bool:
    """Let the fused experts of a transformers model follow autocast; whether it has any.

    Without autocast nothing changes, bit for bit.
    """
    if not any(hasattr(module, "_is_expert_parallel") for module in model.modules()):
        return False
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(_NAME, _experts_forward)
    model.set_experts_implementation(_NAME)  # type: ignore[operator]
    return True


def _experts_forward(module: Any, *args: Tensor) -> Tensor:
    """The stock ``grouped_mm`` forward, on weights cast as autocast would cast a linear layer's."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    device = args[0].device.type
    weights = dict(module.named_parameters())
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        if any(weight.dtype != dtype for weight in weights.values()):
            cast = {name: weight.to(dtype) for name, weight in weights.items()}
            result: Tensor = torch.func.functional_call(module, cast, args)
            return result
    stock: Tensor = ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, *args)
    return stock
