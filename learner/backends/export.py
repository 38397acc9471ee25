"""The policy as a Hugging Face folder, as inference engines load it, written tensor by tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import revert_weight_conversion

from learner.backends.zero_params import gathered, is_zero_shard, whole_shape
from ringasync.durable import room_at
from ringasync.errors import EnvironmentRefusedError

SHARD_BYTES = 1 << 30
"""Of a file of weights, and so of what lies whole in main memory; a larger tensor is alone."""

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "added_tokens.json",
)


def export_hf(
    model: Any, directory: Path, *, dtype: torch.dtype, source: str, write: bool = True
) -> None:
    """Write ``config.json`` and ``model*.safetensors`` with the checkpoint's own tensor names.

    Shards are gathered parameter by parameter, in order; what is gathered is let go of once a file
    of ``SHARD_BYTES`` is full, so no rank ever holds the model. transformers' fusing of experts is
    undone, so a Qwen3-MoE layer has ``mlp.experts.E.gate_proj.weight`` again. ``config.json``
    names the dtype of the files, not that of the float32 master. Tokenizer files are copied from
    ``source``, the starting model, when that is a folder. Of several ranks that hold shards all
    call this and one has ``write``.

    Raises ``EnvironmentRefusedError`` when the disk refuses, after its part in all gathers.
    """
    state = exported_tensors(model)
    if not write:
        for tensor in state.values():
            whole(tensor, dtype)
        return
    folder = HfFolder(model, state, directory, dtype=dtype, source=source)
    for name, tensor in state.items():
        folder.add(name, whole(tensor, dtype).cpu())
    folder.finish()


class HfFolder:
    """A folder that is written parameter by parameter. What the disk refuses is kept for the end:
    until then only the other ranks' gathers go on."""

    def __init__(
        self,
        model: Any,
        state: Mapping[str, Tensor],
        directory: Path,
        *,
        dtype: torch.dtype,
        source: str,
    ) -> None:
        """``state``: what will be added, by name, for its shapes."""
        self._model, self._directory = model, directory
        self._dtype, self._source = dtype, source
        self._bytes = sum(
            whole_shape(one).numel() * published_dtype(one, dtype).itemsize
            for one in state.values()
        )
        self._shards = ShardWriter(directory, SHARD_BYTES)
        self._converts = _Conversion(model, state)
        self._problem: Exception | None = None
        directory.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, value: Tensor) -> None:
        """Take a whole parameter in main memory; what was before it may be written now."""
        if self._problem is not None:
            return
        try:
            for hf_name, part in self._converts.add(name, value):
                self._shards.add(hf_name, part)
        except (OSError, SafetensorError) as error:
            self._problem = error
            self._shards.drop()

    def finish(self) -> None:
        """Write the rest and the configuration. Raises ``EnvironmentRefusedError`` when the disk
        refused any of it."""
        try:
            if self._problem is None:
                # The configuration as transformers writes it; weights are written here.
                self._model.save_pretrained(self._directory, state_dict={})
                self._shards.finish()
                _finish_config(self._directory, self._dtype, self._source)
        except (OSError, SafetensorError) as error:
            self._problem = error
        if self._problem is not None:
            where = self._directory
            raise EnvironmentRefusedError(
                f"weights cannot be written to {where}: {self._problem} "
                f"({room_at(where, self._bytes)}). Free disk space and start again: nothing is "
                "lost, journal and checkpoints go on"
            ) from self._problem


def exported_tensors(model: Any) -> dict[str, Tensor]:
    """Tensors of ``model.state_dict()`` that are published, as they lie, in order.

    Tied weights appear once, under their first name. They are known by being one object: shards
    have no address to compare.
    """
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen and name not in ignored:
            tensors[name] = tensor
        seen.add(id(tensor))
    return tensors


@torch.no_grad()
def whole(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` gathered, floating-point ones as ``dtype``: the cast is made before, on its
    device, so half the bytes travel. A collective where it is a shard."""
    with gathered(tensor):
        value = tensor.detach().to(published_dtype(tensor, dtype), copy=is_zero_shard(tensor))
    return value.full_tensor() if isinstance(value, DTensor) else value


def published_dtype(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """``dtype`` where it is a floating-point one, else its own."""
    return dtype if tensor.is_floating_point() else tensor.dtype


class _Conversion:
    """From the names of the loaded model to those of its files, a parameter at a time.

    Where a model makes one tensor of its files out of several parameters, all wait for the last
    one: found out beforehand, on tensors without memory.
    """

    def __init__(self, model: Any, state: Mapping[str, Tensor]) -> None:
        self._model = model
        bare = {
            name: torch.empty(whole_shape(one), dtype=one.dtype, device="meta")
            for name, one in state.items()
        }
        apart: dict[str, torch.Size] = {}
        for name, one in bare.items():
            apart |= {key: part.shape for key, part in self._files_of({name: one}).items()}
        together = {key: part.shape for key, part in self._files_of(bare).items()}
        self._waiting: dict[str, Tensor] | None = None if apart == together else {}
        self._missing = set(bare)

    def _files_of(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = revert_weight_conversion(self._model, state)
        return found

    def add(self, name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What can be written now that ``value`` is there."""
        if self._waiting is None:
            yield from self._files_of({name: value}).items()
            return
        self._waiting[name] = value
        self._missing.discard(name)
        if not self._missing:
            yield from self._files_of(self._waiting).items()


class ShardWriter:
    """Tensors to safetensors files of at most ``shard_bytes``, written as they come."""

    def __init__(self, directory: Path, shard_bytes: int) -> None:
        self._directory, self._shard_bytes = directory, shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._files: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; writes and lets go of those before it when they fill a file."""
        if self._pending and self._pending_bytes + tensor.nbytes > self._shard_bytes:
            self._write()
        # A part of a fused tensor would keep the whole of it alive.
        is_part = tensor.untyped_storage().nbytes() != tensor.nbytes
        self._pending[name] = tensor.clone() if is_part else tensor.contiguous()
        self._pending_bytes += tensor.nbytes

    def drop(self) -> None:
        """Let go of what is not written."""
        self._pending, self._pending_bytes = {}, 0

    def finish(self) -> None:
        """Write the rest, and give the files the names that loaders look for."""
        if self._pending:
            self._write()
        count = len(self._files)
        names = [f"model-{one:05d}-of-{count:05d}.safetensors" for one in range(1, count + 1)]
        if count == 1:
            names = ["model.safetensors"]
        (self._directory / "model.safetensors").unlink(missing_ok=True)
        for at, name in enumerate(names):
            self._part(at).rename(self._directory / name)
        if count > 1:
            index_of = {one: names[at] for at, held in enumerate(self._files) for one in held}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": index_of}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            path = self._directory / "model.safetensors.index.json"
            path.write_text(text, encoding="utf-8")

    def _part(self, index: int) -> Path:
        return self._directory / f".part-{index:05d}.safetensors"

    def _write(self) -> None:
        save_file(self._pending, self._part(len(self._files)), metadata={"format": "pt"})
        self._files.append(list(self._pending))
        self._total_bytes += self._pending_bytes
        self.drop()


def _finish_config(directory: Path, dtype: torch.dtype, source: str) -> None:
    settings = directory / "config.json"
    config = json.loads(settings.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    settings.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if source and Path(source).is_dir():
        for name in _TOKENIZER_FILES:
            if (Path(source) / name).is_file():
                shutil.copyfile(Path(source) / name, directory / name)
