"""The state of a DeepSpeed engine (ZeRO 1 to 3) as tensors by name, and back.

DeepSpeed holds flat partitions of groups of parameters; here they are whole, parameter by
parameter, as ``torch_state`` names them. All of it are calls of all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from learner.backends.ranks import Ranks
from learner.backends.torch_state import MOMENTS, model_tensors
from learner.backends.zero_params import gathered
from ringasync.errors import CheckpointError

_FLAT = MOMENTS[1:]


@torch.no_grad()
def export_zero(model: nn.Module, zero: Any, ranks: Ranks) -> dict[str, Tensor]:
    """``model.X`` and ``optim.X.{step,exp_avg,exp_avg_sq}`` in main memory, each on one rank: the
    ranks take turns, so that each holds and writes about as much as the others.

    ``zero`` is the engine's optimizer.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    state: dict[str, Tensor] = {}
    if (step := _step_of(zero)) is not None:
        _link_moments(zero)
    for index, (name, tensor) in enumerate(model_tensors(model).items()):
        is_own = index % ranks.size == ranks.rank
        with gathered(tensor):
            if is_own:
                state[f"model.{name}"] = tensor.detach().to("cpu", copy=True)
        if step is None or not tensor.requires_grad:
            continue
        for key in _FLAT:
            whole = safe_get_full_optimizer_state(tensor, key)
            if is_own:
                state[f"optim.{name}.{key}"] = whole.to("cpu", copy=True)
        if is_own:
            state[f"optim.{name}.step"] = torch.tensor(step, dtype=torch.float32)
    return state


@torch.no_grad()
def import_zero(
    model: nn.Module, zero: Any, state: Mapping[str, Tensor], device: torch.device
) -> None:
    """Restore what ``torch_state.check_state`` and ``common_step`` have found to fit."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    for name, tensor in model_tensors(model).items():
        value = state[f"model.{name}"].to(device)
        with gathered(tensor, modifier_rank=0):
            tensor.copy_(value)
        if tensor.requires_grad:
            safe_set_full_fp32_param(tensor, value)
    _fresh_moments(zero, common_step(state))
    for name, parameter in model.named_parameters():
        for key in _FLAT:
            if (whole := state.get(f"optim.{name}.{key}")) is not None:
                safe_set_full_optimizer_state(parameter, whole.to(device), key)


def common_step(state: Mapping[str, Tensor]) -> float | None:
    """How often the optimizer stepped; None: never. Raises ``CheckpointError``."""
    steps = {
        float(tensor)
        for name, tensor in state.items()
        if name.startswith("optim.") and name.endswith(".step")
    }
    if len(steps) > 1:
        raise CheckpointError(
            f"parameters were stepped differently often ({sorted(steps)[:3]} times), which "
            "DeepSpeed cannot go on from: set learner.backend = 'torch'"
        )
    return steps.pop() if steps else None


def _partitions(zero: Any) -> list[Tensor]:
    """What the optimizer inside steps: this rank's flat fp32 parts of the groups."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return list(zero.fp32_partitioned_groups_flat)
    return list(zero.single_partition_of_fp32_groups)


def _step_of(zero: Any) -> float | None:
    for flat in _partitions(zero):
        if "step" in (moments := zero.optimizer.state.get(flat, {})):
            return float(moments["step"])
    return None


def _fresh_moments(zero: Any, step: float | None) -> None:
    """As after ``step`` steps, with moments of zero for ``safe_set_full_optimizer_state``."""
    inner = zero.optimizer
    inner.state.clear()
    if step is None:
        return
    for flat in _partitions(zero):
        place = flat.device if inner.defaults.get("fused") else torch.device("cpu")
        inner.state[flat] = {
            "step": torch.tensor(step, dtype=torch.float32, device=place),
            **{key: torch.zeros_like(flat) for key in _FLAT},
        }
    _link_moments(zero)


def _link_moments(zero: Any) -> None:
    """Let the parameters of ZeRO 1 and 2 find their moments. DeepSpeed does so once, after the step
    of the first of its groups, when the others have none yet."""
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
