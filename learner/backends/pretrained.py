"""The starting model, as every train engine begins from it."""

from __future__ import annotations

from typing import Any

import torch

from ringasync.errors import TrainingError


def load_causal_lm(path: str) -> Any:
    """Any HF causal LM, folder or hub name, in float32. Raises ``TrainingError``."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # logs are lines, not bars
    try:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"cannot load model {path!r}: {error}. Give model.path a folder with config.json "
            "and model.safetensors, or a hub name that this machine can reach"
        ) from error
