"""Weights between a folder of safetensors files and the live parameters of a torch model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from ringasync.errors import EngineError


def stored_dtypes(weights_dir: Path) -> dict[str, torch.dtype]:
    """Names and dtypes of all tensors in a folder. Raises ``EngineError`` when there are none."""
    dtypes: dict[str, torch.dtype] = {}
    for path in _files(weights_dir):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    dtypes[name] = DTYPES[file.get_slice(name).get_dtype()]
        except (OSError, SafetensorError, KeyError) as error:
            raise EngineError(f"{path.name} of {weights_dir} cannot be read: {error!r}") from error
    return dtypes


def copy_into(live: Mapping[str, torch.Tensor], weights_dir: Path) -> None:
    """Copy a folder's tensors into live ones of the same names, in place.

    Names, shapes and readability of everything are checked before the first write, so that a
    broken folder leaves the live weights alone. Raises ``EngineError``.
    """
    loaded: dict[str, torch.Tensor] = {}
    for path in _files(weights_dir):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    loaded[name] = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise EngineError(f"{path.name} of {weights_dir} cannot be read: {error!r}") from error
    unknown = sorted(set(loaded) - set(live))
    if unknown:
        raise EngineError(f"{weights_dir} holds tensors the model does not have: {unknown[:3]}")
    written = {live[name].data_ptr() for name in loaded}
    missing = sorted(name for name, tensor in live.items() if tensor.data_ptr() not in written)
    if missing:
        raise EngineError(f"{weights_dir} lacks tensors of the model: {missing[:3]}")
    for name, tensor in loaded.items():
        if tensor.shape != live[name].shape:
            raise EngineError(
                f"{name} of {weights_dir} has shape {tuple(tensor.shape)}, "
                f"the model's is {tuple(live[name].shape)}"
            )
    with torch.no_grad():
        for name, tensor in loaded.items():
            live[name].copy_(tensor)


def digest(tensor: torch.Tensor, dtype: torch.dtype) -> str:
    """xxh3_128 hex of a tensor's contiguous little-endian bytes in ``dtype``."""
    flat = tensor.detach().to(device="cpu", dtype=dtype).contiguous().reshape(-1)
    return xxhash.xxh3_128_hexdigest(flat.view(torch.uint8).numpy().data)


def _files(weights_dir: Path) -> list[Path]:
    files = sorted(weights_dir.glob("*.safetensors"))
    if not files:
        raise EngineError(f"{weights_dir} holds no .safetensors file")
    return files


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
