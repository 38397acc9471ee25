"""Sequences one behind the other in a single row, each seeing only itself.

The models are those of transformers; attention is put in by its ``AttentionInterface``, and learns
where sequences begin from the arguments that transformers passes to flash attention
(``cu_seq_lens_q``, ``max_length_q``). Rotary positions begin anew by ``position_ids``.

Shape legend: S sequences, T tokens of all, H heads, K heads of keys and values, D head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import structlog
import torch
from torch import Tensor, nn
from torch.nn import functional

from learner.backends import flash4

_kernel: Callable[..., Any] | None
try:
    from torch.nn.attention.varlen import varlen_attn as _kernel
except ImportError:  # before torch 2.10
    _kernel = None
_takes_window = _kernel is not None and "window_size" in inspect.signature(_kernel).parameters
# Settled here, as a compiled layer cannot ask. First a flag said causal, later a window.
_CAUSAL: dict[str, Any] = {"window_size": (-1, 0)} if _takes_window else {"is_causal": True}

Kernel = Literal["auto", "torch", "flash4"]
Attention = Literal["varlen", "sequences"]
"""``varlen``: one kernel for all sequences (bfloat16 on CUDA). ``sequences``: torch's own attention
for one sequence after the other, for any dtype and device."""
PackingMode = Literal["auto", "varlen", "sequences", "off"]

_NAME = "ringasync_packed"
_PROBE_LENGTHS = (3, 5)
_PROBE_TOLERANCE = 1e-4
_KERNEL_LENGTHS = (1, 300, 129)
_KERNEL_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, eq=False)
class Packing:
    """Where sequences begin in a packed row: ``position_ids`` int64 [1, T], ``bounds`` int32
    [S + 1] from 0 to T, which stay in main memory unless ``attention`` reads them on the device."""

    lengths: tuple[int, ...]
    attention: Attention
    position_ids: Tensor
    bounds: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], attention: Attention) -> Packing:
        """Of sequences of ``lengths`` tokens, in main memory."""
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        return cls(tuple(lengths), attention, positions, bounds)

    def to(self, device: torch.device) -> Packing:
        """The same for a forward on ``device``."""
        bounds = self.bounds.to(device) if self.attention == "varlen" else self.bounds
        return Packing(self.lengths, self.attention, self.position_ids.to(device), bounds)

    def sequence_at(self, position: int) -> int:
        """The number of the sequence that has the token at ``position``."""
        ends = self.bounds[1:]
        return int(torch.searchsorted(ends, position, right=True, out_int32=True))

    def arguments(self) -> dict[str, Any]:
        """What the forward of a model takes beside ``input_ids`` [1, T]."""
        longest = max(self.lengths)
        return {
            "position_ids": self.position_ids,
            "cu_seq_lens_q": self.bounds,
            "cu_seq_lens_k": self.bounds,
            "max_length_q": longest,
            "max_length_k": longest,
        }


def choose_packing(
    model: nn.Module,
    mode: PackingMode,
    device: torch.device,
    dtype: torch.dtype,
    kernel: Kernel = "auto",
) -> Attention | None:
    """How ``model`` is trained on packed rows; None: on padded ones, and the log tells why.

    ``dtype`` is that of the forwards. ``model`` is left as it came. ``kernel`` runs the attention
    of ``varlen`` from here on, or torch's does and the log tells why.
    """
    if mode == "off":
        return None
    log = structlog.get_logger(__name__)
    if why := packing_problem(model):
        log.warning(
            "learner.packing has no effect: rows are padded", model=type(model).__name__, why=why
        )
        return None
    able = device.type == "cuda" and dtype == torch.bfloat16 and _kernel is not None
    if mode == "varlen" and not able:
        log.warning(
            "learner.packing = 'varlen' needs bfloat16 on CUDA and torch.nn.attention.varlen: "
            "attention runs sequence by sequence",
            device=str(device),
        )
    if not able or mode == "sequences":
        return "sequences"
    if why := _choose_kernel(model, kernel, device):
        log.warning("attention runs sequence by sequence, not by one kernel for all", why=why)
        return "sequences"
    return "varlen"


def _choose_kernel(model: Any, kernel: Kernel, device: torch.device) -> str:
    """Settle what runs ``varlen``; why nothing can with the heads of ``model``, else empty."""
    config, log = model.config, structlog.get_logger(__name__)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    wanted = kernel == "flash4" or (kernel == "auto" and flash4.installed())
    probe = partial(kernel_error, device, heads, kv_heads, size)
    if why := flash4.use_flash4(wanted, device, probe):
        log.warning("attention runs by torch's kernel, not by FlashAttention 4", why=why)
    why = "" if flash4.is_used() else flash4.problem_of(probe)
    if not why:
        log.info("attention of packed rows", kernel="flash4" if flash4.is_used() else "torch")
    return why


def kernel_error(device: torch.device, heads: int, kv_heads: int, size: int) -> float:
    """The largest relative error (L2) of output and gradients of the varlen kernel in bfloat16
    against float32 attention, sequence by sequence; NaN where one is."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, weights = (
        torch.randn(sum(_KERNEL_LENGTHS), count, size, device=device, generator=generator)
        for count in (heads, kv_heads, kv_heads, heads)
    )
    found: list[Sequence[Tensor]] = []
    for attention, dtype in (("varlen", torch.bfloat16), ("sequences", torch.float32)):
        packing = Packing.of(_KERNEL_LENGTHS, attention).to(device)  # type: ignore[arg-type]
        leaves = [one.bfloat16().to(dtype).requires_grad_() for one in (q, k, v)]
        with torch.enable_grad():
            a, b, c = leaves
            output = _packed(a, b, c, packing.bounds, max(_KERNEL_LENGTHS), None)
            gradients = torch.autograd.grad(output, leaves, weights.bfloat16().to(dtype))
        found.append([output.detach(), *gradients])
    errors = [(one - other).norm() / other.norm() for one, other in zip(*found, strict=True)]
    return float(torch.stack(errors).max())  # torch's maximum with a NaN is NaN


def use_packed_attention(model: nn.Module) -> None:
    """Let ``model`` take packed rows; padded ones go on as before, by torch's attention."""
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, packed_attention)
    model.set_attn_implementation(_NAME)  # type: ignore[operator]


@torch.no_grad()
def packing_problem(model: Any) -> str:
    """Why sequences of a packed row would not be scored as each alone; empty if they are.

    Seen in forwards of a few tokens, whatever a model does besides, known here or not; only a
    window of attention, which so few tokens do not fill, is known by the configuration.
    """
    config = getattr(model, "config", None)
    if not getattr(model, "_can_set_attn_implementation", lambda: False)():
        return "its attention cannot be set through transformers' AttentionInterface"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"it has layers of other kinds: {sorted(kinds - {'full_attention'})}"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return "its attention has a sliding window"
    device, vocab = next(model.parameters()).device, model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(sum(_PROBE_LENGTHS), device=device)[None] + 1) % vocab
    alone = [model(input_ids=one, use_cache=False).logits for one in ids.split(_PROBE_LENGTHS, 1)]
    before = config._attn_implementation  # type: ignore[union-attr]
    use_packed_attention(model)
    try:
        packing = Packing.of(_PROBE_LENGTHS, "sequences").to(device)
        together = model(input_ids=ids, use_cache=False, **packing.arguments()).logits
    except TypeError as error:
        return f"its forward does not take the bounds of sequences: {error}"
    finally:
        model.set_attn_implementation(before)
    expected = torch.cat(alone, dim=1).float()
    off = float((together.float() - expected).abs().max() / expected.abs().max().clamp(min=1e-9))
    # Written so that NaN is a problem too.
    return "" if off <= _PROBE_TOLERANCE else f"a packed row changes its logits by {off:.1e}"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence: ``query`` [1, H, T, D], ``key`` and ``value``
    [1, K, T, D] to [1, T, H, D]. Without bounds, transformers' own ``sdpa``."""
    if cu_seq_lens_q is None or max_length_q is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        padded: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
        return padded
    # Cast before anything is taken apart: once, and within a compiled layer.
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    q, k, v = (one[0].transpose(0, 1).to(dtype) for one in (query, key, value))
    return _packed(q, k, v, cu_seq_lens_q, max_length_q, scaling)[None], None


def _packed(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float | None
) -> Tensor:
    """[T, H, D], [T, K, D] twice to [T, H, D]."""
    if bounds.is_cuda and _kernel is not None and query.dtype in _KERNEL_DTYPES:
        return _varlen(query, key, value, bounds, longest, scale)
    # FSDP moves whatever its root is called with to the device, these bounds too.
    result: Tensor = _by_sequence(query, key, value, bounds.cpu(), scale)
    return result


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float | None
) -> Tensor:
    """As ``_packed``."""
    if flash4.is_used():
        attended: Tensor = flash4.attend(
            query.contiguous(), key.contiguous(), value.contiguous(), bounds, longest, scale
        )
        return attended
    kernel: Any = _kernel
    usual = query.shape[-1] ** -0.5
    if scale is not None and scale != usual:
        query = query * (scale / usual)  # the first of these kernels took no scale
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # not every torch's kernel shares heads of keys in the backward pass
        key, value = (one.repeat_interleave(groups, dim=1) for one in (key, value))
    result: Tensor = kernel(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        bounds,
        bounds,
        longest,
        longest,
        **_CAUSAL,
    )
    return result


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _by_sequence(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scale: float | None
) -> Tensor:
    """As ``_packed``. Not compiled: the lengths, other ones each time, would be part of it.

    Split, for the backward pass of a slice writes zeros to the whole row.
    """
    lengths: list[int] = bounds.diff().tolist()  # in main memory: nothing waits for the device
    grouped = query.shape[1] != key.shape[1]
    parts = []
    for sequence in zip(*(torch.split(one, lengths) for one in (query, key, value)), strict=True):
        q, k, v = (one.transpose(0, 1)[None] for one in sequence)
        parts.append(
            functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=grouped
            )
        )
    return torch.cat([one[0].transpose(0, 1) for one in parts])
