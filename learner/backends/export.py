"""The policy as a Hugging Face folder, as inference engines load it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

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
    """Write ``config.json`` and ``model.safetensors`` with the checkpoint's own tensor names.

    transformers undoes its fusing of experts while it saves (``save_original_format``, its
    default), so a Qwen3-MoE layer has ``mlp.experts.E.gate_proj.weight`` again. ``config.json``
    names the dtype of the file, not that of the float32 master. Tokenizer files are copied from
    ``source``, the starting model, when that is a folder. Of several ranks that hold shards all
    call this and one has ``write``.
    """
    weights = host_weights(model, dtype, keep=write)
    if not write:
        return
    model.save_pretrained(directory, state_dict=weights)
    settings = directory / "config.json"
    config = json.loads(settings.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    settings.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if source and Path(source).is_dir():
        for name in _TOKENIZER_FILES:
            if (Path(source) / name).is_file():
                shutil.copyfile(Path(source) / name, directory / name)


@torch.no_grad()
def host_weights(model: Any, dtype: torch.dtype, *, keep: bool = True) -> dict[str, Tensor]:
    """Tensors of ``model.state_dict()`` on the CPU: floating-point ones as ``dtype``.

    Tied weights appear once, under their first name: after the cast they would no longer share
    memory, and transformers would write the LM head a second time. They are known by being one
    object: shards have no address to compare. The cast is made on the model's device, so half the
    bytes cross the bus. Shards are gathered tensor by tensor; a rank that does not ``keep`` them
    only takes part in that, and gets nothing.
    """
    seen: set[int] = set()
    weights: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        value = tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype)
        if isinstance(value, DTensor):
            value = value.full_tensor()
        if keep:
            weights[name] = value.cpu().contiguous()
    return weights
