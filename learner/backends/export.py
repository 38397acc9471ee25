"""The policy as a Hugging Face folder, as inference engines load it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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


def export_hf(model: Any, directory: Path, *, dtype: torch.dtype, source: str) -> None:
    """Write ``config.json`` and ``model.safetensors`` with the checkpoint's own tensor names.

    transformers undoes its fusing of experts while it saves (``save_original_format``, its
    default), so a Qwen3-MoE layer has ``mlp.experts.E.gate_proj.weight`` again. ``config.json``
    names the dtype of the file, not that of the float32 master. Tokenizer files are copied from
    ``source``, the starting model, when that is a folder.
    """
    model.save_pretrained(directory, state_dict=host_weights(model, dtype))
    settings = directory / "config.json"
    config = json.loads(settings.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    settings.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if source and Path(source).is_dir():
        for name in _TOKENIZER_FILES:
            if (Path(source) / name).is_file():
                shutil.copyfile(Path(source) / name, directory / name)


def host_weights(model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of ``model.state_dict()`` on the CPU: floating-point ones as ``dtype``.

    Tied weights appear once, under their first name: after the cast they would no longer share
    memory, and transformers would write the LM head a second time. The cast is made on the model's
    device, so half the bytes cross the bus.
    """
    seen: set[tuple[int, torch.Size]] = set()
    weights: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        weights[name] = tensor.detach().to(kind).cpu().contiguous()
    return weights
