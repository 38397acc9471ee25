"""Router parameters of mixture-of-experts models, found by name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Literal

import structlog
from torch import nn

Freeze = Literal["none", "bias", "all"]
"""``bias``: only what is added to the router's choice; ``all``: its matrix too."""

_BIASES = ("bias", "e_score_correction_bias", "expert_bias")


def router_parameters(names: Iterable[str]) -> list[str]:
    """Names of router parameters, in order.

    A router is a module called ``router``, or one called ``gate`` beside the ``experts`` it chooses
    from; so ``gate_proj`` of a dense layer and the gate of a shared expert are none. A selection
    bias (``e_score_correction_bias``, ``expert_bias``) belongs to it wherever it lies.
    """
    every = list(names)
    with_experts = {name[: name.index("experts.")] for name in every if "experts." in name}
    return [name for name in every if _is_router(name, with_experts)]


def _is_router(name: str, with_experts: Collection[str]) -> bool:
    if name.rsplit(".", 1)[-1] in _BIASES[1:]:
        return True
    for match in re.finditer(r"(?:^|(?<=\.))(gate|router)\.", name):
        if match.group(1) == "router" or name[: match.start()] in with_experts:
            return True
    return False


def is_router_bias(name: str) -> bool:
    """Whether a router parameter is a bias rather than a matrix."""
    return name.rsplit(".", 1)[-1] in _BIASES


def freeze_routers(model: nn.Module, what: Freeze) -> list[str]:
    """Take gradients from router parameters; their names. A frozen parameter stays in the state.

    A selection bias kept as a buffer never had any, so it is not named. What finds nothing to
    freeze is logged: a setting without effect is worth a line.
    """
    if what == "none":
        return []
    parameters = dict(model.named_parameters())
    routers = router_parameters(parameters)
    frozen = [name for name in routers if what == "all" or is_router_bias(name)]
    for name in frozen:
        parameters[name].requires_grad_(False)
    log = structlog.get_logger(__name__)
    if frozen:
        log.info("router frozen", what=what, parameters=len(frozen), first=frozen[0])
    else:
        reason = "its routers have no bias" if routers else "the model has no router"
        log.warning(f"learner.freeze_router freezes nothing: {reason}", what=what)
    return frozen
