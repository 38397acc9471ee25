"""The LM head in float32 above a body in bfloat16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def use_float32_head(model: nn.Module, body_dtype: torch.dtype) -> None:
    """Let the output embedding of a transformers model multiply and answer in float32.

    Its inputs are first rounded to ``body_dtype``, as the inference engine has them: published
    weights and hidden states there are in that dtype, products of two bfloat16 numbers are exact in
    float32, and only the sums and the logits are no longer rounded (vLLM's ``head_dtype`` does the
    same). The master weight stays float32 and gets its gradient through the rounding.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Linear):
        raise TypeError(f"model.head_dtype = 'float32' needs a linear LM head, not {type(head)}")

    def forward(hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if head.bias is None else head.bias.to(body_dtype).float()
            weight = head.weight.to(body_dtype).float()
            return functional.linear(hidden.to(body_dtype).float(), weight, bias)

    head.__dict__["forward"] = forward  # shadows the method; the parameter keeps its name
