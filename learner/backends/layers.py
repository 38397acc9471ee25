"""The decoder layers of a model: what they pass on, what is computed again, compilation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import structlog
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from learner.backends.compiled import compiled_program

_EAGER_TOKENS = 8
"""Inputs of up to this many tokens are probes; a program compiled for them is used for no other."""


def use_residual_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Let the hidden states [B, L, H] between layers be in ``dtype`` under autocast.

    Autocast leaves sums in the dtype of their parts: float32 from the embedding on, or from a layer
    whose experts answer in that. Rounded there, the residuals are in ``dtype`` as in an engine
    whose weights are.
    """
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    for module in (embedding, *_layers(model)):
        module.register_forward_hook(
            lambda _module, _args, output: output.to(dtype) if torch.is_tensor(output) else output
        )


def prepare_layers(model: nn.Module, *, checkpointing: bool, compiled: bool) -> int:
    """Wrap the forward of every decoder layer; how many there are.

    ``checkpointing``: of a layer only its input stays for the backward pass, which runs the layer
    again. Models of the learner are in eval mode (no dropout), where transformers' own switch does
    nothing. ``compiled``: torch.compile makes one program for all layers of the same build. Names
    of parameters stay as they are.
    """
    if not checkpointing and not compiled:
        return 0
    layers = _layers(model)
    if not layers:
        structlog.get_logger(__name__).warning(
            "learner.activation_checkpointing and learner.compile have no effect: the model has "
            "no list of decoder layers called 'layers'",
            model=type(model).__name__,
        )
        return 0
    for layer in layers:
        forward: Callable[..., Any] = layer.forward
        if compiled:
            forward = _compiled(forward)
        if checkpointing:
            forward = _checkpointed(forward)
        layer.__dict__["forward"] = forward  # shadows the method
    return len(layers)


def _layers(model: nn.Module) -> Sequence[nn.Module]:
    body: Any = getattr(model, "base_model", model)
    layers = getattr(body, "layers", None)
    return tuple(layers) if isinstance(layers, nn.ModuleList) else ()


def _compiled(plain: Callable[..., Any]) -> Callable[..., Any]:
    program = compiled_program(plain)

    @wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        run = plain if hidden.shape[:2].numel() <= _EAGER_TOKENS else program
        return run(*args, **kwargs)

    return forward


def _checkpointed(plain: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        # Nothing is random in eval mode, so no generator's state need be restored.
        return checkpoint(plain, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return forward
