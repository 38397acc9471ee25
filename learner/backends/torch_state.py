"""A torch model and its AdamW as one flat dictionary of tensors, and back, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from learner.backends.zero_params import whole_shape
from ringasync.config.schema import LearnerConfig
from ringasync.errors import CheckpointError

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def export_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, updates: int, device: torch.device
) -> dict[str, Tensor]:
    """Names: ``model.X``, ``optim.X.{step,exp_avg,exp_avg_sq}``, ``train.updates``, ``rng.*``.

    Tied weights appear once. The learning-rate schedule is a function of ``train.updates``.
    ``device`` is where the model trains, wherever it lies now.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in model_tensors(model).items():
        state[f"model.{name}"] = tensor.detach()
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"optim.{name}.{key}"] = torch.as_tensor(value).detach()
    return state | rest_of_state(updates, device)


def rest_of_state(updates: int, device: torch.device) -> dict[str, Tensor]:
    """``train.updates`` and ``rng.*``."""
    state = {
        "train.updates": torch.tensor(updates, dtype=torch.int64),
        "rng.torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["rng.cuda"] = torch.cuda.get_rng_state(device)
    return state


def import_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Tensor],
    device: torch.device,
) -> int:
    """Restore ``export_state``; returns the updates done. Nothing is changed when it raises.

    Raises: ``CheckpointError`` when names or shapes are not this model's.
    """
    tensors = check_state(model, state)
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(state[f"model.{name}"])
    _import_moments(model, optimizer, state)
    return import_rest(state, device)


def import_rest(state: Mapping[str, Tensor], device: torch.device) -> int:
    """Restore ``rest_of_state``; returns the updates done."""
    if "rng.torch" in state:
        torch.set_rng_state(state["rng.torch"])
    if "rng.cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["rng.cuda"], device)
    return int(state["train.updates"])


def move_state(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Move parameters, buffers and moments to ``device`` in place, without loss of a bit.

    The optimizer keeps its parameters; AdamW's step counters stay in main memory as they were,
    unless it is the fused one, which has them beside the parameters.
    """
    model.to(device)
    for moments in optimizer.state.values():
        for key in _beside_parameters(optimizer):
            if key in moments:
                moments[key] = moments[key].to(device)


def make_optimizer(
    params: Sequence[nn.Parameter], learner: LearnerConfig, *, fused: bool
) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only. ``fused``: one kernel for all parameters, whose
    counters of steps lie beside them."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in params if p.ndim >= 2]},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=learner.lr,
        betas=learner.betas,
        eps=learner.adam_eps,
        weight_decay=learner.weight_decay,
        fused=fused or None,
    )


def _beside_parameters(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    return MOMENTS if optimizer.defaults.get("fused") else MOMENTS[1:]


def check_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's tensors by name, if ``state`` has them all in their shapes.

    Raises ``CheckpointError``.
    """
    tensors = model_tensors(model)
    saved = {name[6:]: value for name, value in state.items() if name.startswith("model.")}
    if saved.keys() != tensors.keys():
        odd = sorted(saved.keys() ^ tensors.keys())[:3]
        raise CheckpointError(f"the checkpoint is of another model: tensors {odd} do not match")
    for name, tensor in tensors.items():
        shape = whole_shape(tensor)
        if saved[name].shape != shape:
            raise CheckpointError(
                f"the checkpoint is of another model: {name} has shape "
                f"{tuple(saved[name].shape)}, the model {tuple(shape)}"
            )
    if "train.updates" not in state:
        raise CheckpointError("the checkpoint does not say how many updates were made")
    return tensors


def _import_moments(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]
) -> None:
    for name, parameter in model.named_parameters():
        optimizer.state.pop(parameter, None)
        moments = {
            key: state[f"optim.{name}.{key}"].clone()
            for key in MOMENTS
            if f"optim.{name}.{key}" in state
        }
        if moments:
            for key in _beside_parameters(optimizer):
                moments[key] = moments[key].to(parameter.device)
            optimizer.state[parameter] = moments


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters (tied ones once) and persistent buffers by name."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in parameters:
            tensors[name] = tensor
    return tensors
