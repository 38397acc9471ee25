"""FlashAttention 4 (package ``flash-attn-4``) for packed rows, where it may be had.

It is young, so it is used only after it has given the numbers of plain attention on this device,
with the heads of the model.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import structlog
import torch
from torch import Tensor

_PACKAGE = "flash_attn.cute"
_CAPABILITIES = (9, 10)
_TOLERANCE = 0.02
"""Relative error (L2) of bfloat16 results against float32 ones that is still rounding."""
_used = False


def use_flash4(wanted: bool, device: torch.device, probe: Callable[[], float]) -> str:
    """Let FlashAttention 4 run the packed attention of this process, or torch's kernel again; why
    it does not although ``wanted``, else empty.

    ``probe``: the relative error of packed attention in bfloat16 with the heads of the model.
    """
    global _used
    _used = False
    if not wanted:
        return ""
    if why := _missing(device):
        return why
    _used = True
    why = problem_of(probe)
    _used = not why
    return why


def problem_of(probe: Callable[[], float]) -> str:
    """Why a kernel that ``probe`` runs is not to be used; empty if its results are right.

    ``probe``: the relative error of packed attention in bfloat16 with the heads of the model.
    """
    try:
        off = probe()
    except Exception as error:  # refused, or compiled here in a compiler that is not ours
        structlog.get_logger(__name__).debug("the attention kernel failed", exc_info=True)
        return f"it failed with {type(error).__name__}: {str(error)[:200]}"
    # Written so that NaN is a problem too.
    return "" if off <= _TOLERANCE else f"its results are off by {off:.1e}"


def is_used() -> bool:
    """Whether FlashAttention 4 runs the packed attention of this process."""
    return _used


def installed() -> bool:
    """Whether the package is there."""
    try:
        return importlib.util.find_spec(_PACKAGE) is not None
    except ImportError:  # its parent package is missing, or is another one of that name
        return False


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float | None
) -> Tensor:
    """Causal attention within each sequence: ``query`` [T, H, D], ``key`` and ``value`` [T, K, D]
    to [T, H, D]; ``bounds`` int32 [S + 1] on the device."""
    from flash_attn.cute import flash_attn_varlen_func  # type: ignore[import-not-found]

    found: Any = flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scale,
        causal=True,
    )
    result: Tensor = found[0] if isinstance(found, tuple) else found
    return result


def _missing(device: torch.device) -> str:
    if not installed():
        return "the package flash-attn-4 is not installed (extra `flash`)"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in _CAPABILITIES:
        return f"it needs a GPU of compute capability 9 or 10, and this one has {major}.{minor}"
    return ""
