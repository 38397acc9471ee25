"""Where in vLLM's live parameters each published tensor is: fused, sharded or packed.

vLLM fuses q, k, v and gate, up, shards them over tensor-parallel ranks, pads the vocabulary, and on
a CPU packs linear weights into a form that only their kernel reads. ``LiveLayout`` says for every
HF name which slice of the whole tensor this rank holds and how to get at the live values: as a view
of a parameter, or through the kernel (a one-hot input brings out a column of the weight exactly).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLED_COLUMNS = 64
"""Columns read through a kernel when a weight has more; a swap that was not applied changes all."""
_ALL_COLUMNS_UP_TO = 256

_EXPERT_PARTS = (("gate", "w13", True), ("up", "w13", False), ("down", "w2", True))
"""Name, the fused weight it is in, and whether it is the upper part of it."""

Cut = Callable[[Tensor], Tensor]
Compare = Callable[[Tensor], bool]


@dataclass(frozen=True, slots=True)
class Place:
    """One place of one HF tensor. ``cut`` gives the slice of the whole tensor that belongs there.

    ``view`` are the live values where they lie plainly; else ``equals`` compares the slice with
    them in its own way.
    """

    cut: Cut
    view: Tensor | None = None
    equals: Compare | None = None


class LiveLayout:
    """The places of all tensors whose place is known, by HF name."""

    def __init__(self, model: nn.Module) -> None:
        self._places: dict[str, list[Place]] = defaultdict(list)
        for name, place in _places(model):
            self._places[name].append(place)

    def is_plain(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether each tensor can be copied straight into views of live parameters."""
        return all(
            name in self._places and all(place.view is not None for place in self._places[name])
            for name in tensors
        )

    @torch.no_grad()
    def copy_in(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors into the live model. All shapes are checked before the first write."""
        moves = []
        for name, tensor in tensors.items():
            for place in self._places[name]:
                view, part = place.view, place.cut(tensor)
                if view is None or part.shape != view.shape:
                    raise RuntimeError(f"{name} {tuple(part.shape)} has no plain place of its own")
                moves.append((view, part))
        for view, part in moves:
            view.copy_(part, non_blocking=True)

    @torch.no_grad()
    def differing(self, tensors: Mapping[str, Tensor]) -> tuple[set[str], set[str]]:
        """Names whose live values differ from ``tensors``, and names whose place is not known."""
        unknown = {name for name in tensors if name not in self._places}
        verdicts: dict[str, Tensor | bool] = {}
        differing = set()
        for name, tensor in tensors.items():
            for place in self._places.get(name, ()):
                if not _same(place, tensor, verdicts, name):
                    differing.add(name)
        # One wait for the device instead of one a tensor.
        on_device = {name: v for name, v in verdicts.items() if isinstance(v, Tensor)}
        if on_device:
            flags = torch.stack(list(on_device.values())).cpu().tolist()
            differing |= {name for name, same in zip(on_device, flags, strict=True) if not same}
        return differing, unknown


def _same(place: Place, tensor: Tensor, verdicts: dict[str, Tensor | bool], name: str) -> bool:
    part, view = place.cut(tensor), place.view
    if place.equals is not None:
        return place.equals(part)
    if view is None or part.shape != view.shape:
        return False
    if view.device.type == "cpu":
        return torch.equal(view, part.to(view.dtype))
    same = (view == part.to(device=view.device, dtype=view.dtype)).all()
    verdicts[name] = same & verdicts[name] if name in verdicts else same
    return True


def _places(model: nn.Module) -> Iterator[tuple[str, Place]]:
    """(HF name, place), module by module; a shared embedding comes up once for each use."""
    packed: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {}) or {}
    for name, module in model.named_modules():
        kind = type(module)
        names = [base.__name__ for base in kind.__mro__]
        if "QKVParallelLinear" in names:
            found = _qkv(name, module, packed)
        elif "MergedColumnParallelLinear" in names:
            found = _merged(name, module, packed)
        elif "RowParallelLinear" in names:
            found = _linear(name, module, dim=1)
        elif "ColumnParallelLinear" in names:
            found = _linear(name, module, dim=0)
        elif "ReplicatedLinear" in names:
            found = _linear(name, module, dim=None)
        elif "VocabParallelEmbedding" in names:
            found = _vocab(name, module)
        elif hasattr(module, "w13_weight") and hasattr(module, "w2_weight"):
            found = _experts(name, module)
        else:
            found = _plain(name, module)
        yield from found
    yield from _tied_heads(model)


def _plain(name: str, module: nn.Module) -> Iterator[tuple[str, Place]]:
    for own, parameter in module.named_parameters(recurse=False):
        yield _join(name, own), Place(lambda whole: whole, parameter.data)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _rows(start: int, count: int) -> Cut:
    return lambda whole: whole.narrow(0, start, count)


def _columns(start: int, count: int) -> Cut:
    return lambda whole: whole.narrow(1, start, count)


def _qkv(name: str, module: Any, packed: Mapping[str, list[str]]) -> Iterator[tuple[str, Place]]:
    parent, _, own = name.rpartition(".")
    parts = packed.get(own, ["q_proj", "k_proj", "v_proj"])
    value_size = getattr(module, "v_head_size", module.head_size)
    sizes = [
        module.num_heads * module.head_size,
        module.num_kv_heads * module.head_size,
        module.num_kv_heads * value_size,
    ]
    kv_rank = module.tp_rank // module.num_kv_head_replicas
    ranks = [module.tp_rank, kv_rank, kv_rank]
    yield from _fused_rows(parent, module, parts, sizes, ranks)


def _merged(name: str, module: Any, packed: Mapping[str, list[str]]) -> Iterator[tuple[str, Place]]:
    parent, _, own = name.rpartition(".")
    parts = packed.get(own, [])
    if len(parts) != len(module.output_sizes):
        return
    sizes = [size // module.tp_size for size in module.output_sizes]
    yield from _fused_rows(parent, module, parts, sizes, [module.tp_rank] * len(parts))


def _fused_rows(
    parent: str, module: Any, parts: list[str], sizes: list[int], ranks: list[int]
) -> Iterator[tuple[str, Place]]:
    """Tensors that lie one below the other in one weight (and bias)."""
    start = 0
    for part, size, rank in zip(parts, sizes, ranks, strict=True):
        prefix = _join(parent, part)
        cut = _rows(rank * size, size)
        yield f"{prefix}.weight", _weight_rows(module, cut, start, size)
        if getattr(module, "bias", None) is not None:
            yield f"{prefix}.bias", Place(cut, module.bias.data.narrow(0, start, size))
        start += size


def _weight_rows(module: Any, cut: Cut, start: int, size: int) -> Place:
    if _is_packed(module):
        return Place(cut, equals=lambda part: _kernel_rows_equal(module, start, part))
    return Place(cut, module.weight.data.narrow(0, start, size))


def _linear(name: str, module: Any, dim: int | None) -> Iterator[tuple[str, Place]]:
    rank, size = getattr(module, "tp_rank", 0), getattr(module, "tp_size", 1)

    def cut(whole: Tensor) -> Tensor:
        if dim is None or size == 1:
            return whole
        count = whole.shape[dim] // size
        return whole.narrow(dim, rank * count, count)

    if _is_packed(module):
        yield f"{name}.weight", Place(cut, equals=lambda part: _kernel_rows_equal(module, 0, part))
    else:
        yield f"{name}.weight", Place(cut, module.weight.data)
    if getattr(module, "bias", None) is not None:
        yield f"{name}.bias", Place(cut if dim == 0 else lambda whole: whole, module.bias.data)


def _vocab(name: str, module: Any) -> Iterator[tuple[str, Place]]:
    indices = module.shard_indices
    start, end = indices.org_vocab_start_index, indices.org_vocab_end_index
    cut = _rows(start, end - start)
    if module.weight.numel():
        yield f"{name}.weight", Place(cut, module.weight.data.narrow(0, 0, end - start))
    if hasattr(module, "cpu_linear"):
        yield f"{name}.weight", Place(cut, equals=lambda part: _kernel_rows_equal(module, 0, part))


def _tied_heads(model: Any) -> Iterator[tuple[str, Place]]:
    """A head with a packed copy of the embedding's weight, published under that one's name."""
    config = getattr(model, "config", None)
    head, body = getattr(model, "lm_head", None), getattr(model, "model", None)
    embedding = getattr(body, "embed_tokens", None)
    tied = getattr(config, "tie_word_embeddings", False)
    if tied and head is not None and embedding is not None and hasattr(head, "cpu_linear"):
        for _, place in _vocab("", head):
            if place.equals is not None:
                yield "model.embed_tokens.weight", place


def _experts(name: str, module: Any) -> Iterator[tuple[str, Place]]:
    """Experts lie in ``w13`` [E, 2 I, H] (gate above up) and ``w2`` [E, H, I], E of this rank."""
    base = re.sub(r"\.experts(\..*)?$", ".experts", name)
    if _kernel_packs_experts(module):
        yield from _packed_experts(base, module)
        return
    w13, w2 = module.w13_weight, module.w2_weight
    for expert, local in _local_experts(module):
        names = [f"{base}.{expert}.{part}_proj.weight" for part in ("gate", "up", "down")]
        inner = w2.shape[2]
        rank, size = _expert_ranks(module)
        rows, columns = _rows(rank * inner, inner), _columns(rank * inner, inner)
        if size == 1:
            rows = columns = lambda whole: whole
        yield names[0], Place(rows, w13.data[local, :inner])
        yield names[1], Place(rows, w13.data[local, inner : 2 * inner])
        yield names[2], Place(columns, w2.data[local])


def _local_experts(module: Any) -> list[tuple[int, int]]:
    """(expert of the model, its row here)."""
    chosen = getattr(module, "expert_map", None)
    if chosen is None:
        chosen = getattr(module, "_expert_map", None)
    if chosen is None:
        return [(i, i) for i in range(module.w13_weight.shape[0])]
    return [(e, int(row)) for e, row in enumerate(chosen.tolist()) if row >= 0]


def _expert_ranks(module: Any) -> tuple[int, int]:
    parallel = module.moe_config.moe_parallel_config
    return int(parallel.tp_rank), int(parallel.tp_size)


# What only a kernel of the CPU backend can read.


def _is_packed(module: Any) -> bool:
    return bool(hasattr(module, "cpu_linear") and module.weight.numel() == 0)


def _kernel_rows_equal(module: Any, start: int, part: Tensor) -> bool:
    """Compare rows ``start``... of the packed weight with ``part`` [rows, K], column by column.

    A one-hot input gives one column: a product with one and sums of zeros are exact.
    """
    rows, width = part.shape
    columns = torch.arange(width)
    if width > _ALL_COLUMNS_UP_TO:
        columns = torch.randperm(width)[:_SAMPLED_COLUMNS]
    one_hot = torch.zeros(len(columns), width, dtype=part.dtype)
    one_hot[torch.arange(len(columns)), columns] = 1
    seen = module.cpu_linear(one_hot, module.weight, None)
    return torch.equal(seen[:, start : start + rows].t(), part[:, columns].to(seen.dtype))


def _kernel_packs_experts(module: Any) -> bool:
    return bool(module.w13_weight.device.type == "cpu")


def _packed_experts(base: str, module: Any) -> Iterator[tuple[str, Place]]:
    """Packing what should be there gives, byte for byte, what is there, or it is not there."""
    for expert, local in _local_experts(module):
        for part, weight, upper in (
            ("gate", "w13", True),
            ("up", "w13", False),
            ("down", "w2", True),
        ):

            def equals(
                wanted: Tensor, local: int = local, weight: str = weight, upper: bool = upper
            ) -> bool:
                return _packed_equal(module, weight, local, upper, wanted)

            yield f"{base}.{expert}.{part}_proj.weight", Place(lambda whole: whole, equals=equals)


def _packed_equal(module: Any, weight: str, local: int, upper: bool, wanted: Tensor) -> bool:
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import cpu_prepack_moe_weight

    live: Tensor = getattr(module, f"{weight}_weight")[local]
    experts = module.quant_method.moe_kernel.fused_experts
    rows, width = wanted.shape
    filled = torch.zeros(1, rows * (2 if weight == "w13" else 1), width, dtype=wanted.dtype)
    start = 0 if upper else rows
    filled[0, start : start + rows] = wanted
    mask = torch.zeros_like(filled)
    mask[0, start : start + rows] = 1
    packed = cpu_prepack_moe_weight(filled, experts.isa).reshape(-1)
    where = cpu_prepack_moe_weight(mask, experts.isa).reshape(-1) != 0
    seen = live.reshape(-1)
    return packed.shape == seen.shape and torch.equal(seen[where], packed[where])
