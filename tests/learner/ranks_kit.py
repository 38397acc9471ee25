"""Two ranks, mostly on the CPU: the test's process is rank 0, a child that lives as long is rank 1.

As a module it is the child: ``STORE DEVICE``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgpack
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from learner.backends.deepspeed_backend import DeepSpeedBackend
from learner.backends.ranked import RankedBackend, make_call
from learner.backends.ranks import Ranks
from learner.backends.sharding import RankGroup
from learner.backends.torch_backend import TorchBackend, TorchSettings
from learner.devices import resolve_device
from ringasync.config.schema import LearnerConfig, LossConfig
from ringasync.errors import RingError

from .kit import tiny_model
from .moe_kit import tiny_moe

RANKS = 2
_TIMEOUT = timedelta(seconds=90)
"""Of a collective that one rank alone is in: the test fails then, and does not hang."""


def build(spec: dict[str, Any], group: RankGroup | None = None) -> TorchBackend:
    """The engine of ``spec``: learner, loss, temperature, model; on all ranks of ``group``."""
    make = {"tied": tiny_model, "untied": lambda: tiny_model(tied=False), "moe": tiny_moe}
    settings = TorchSettings(
        LearnerConfig.model_validate(spec["learner"]),
        LossConfig.model_validate(spec["loss"]),
        spec["temperature"],
        dtype=getattr(torch, spec["dtype"]),
    )
    kind = DeepSpeedBackend if settings.learner.backend == "deepspeed" else TorchBackend
    return kind(make[spec["model"]](), settings, group=group)


def spec_of(
    learner: LearnerConfig | None = None,
    loss: LossConfig | None = None,
    *,
    temperature: float = 1.0,
    model: str = "tied",
    dtype: str = "float32",
) -> dict[str, Any]:
    """Plain data for ``build``."""
    learner = learner or LearnerConfig(lr=1e-3, warmup_steps=0)
    return {
        "learner": learner.model_dump(mode="json"),
        "loss": (loss or LossConfig()).model_dump(mode="json"),
        "temperature": temperature,
        "model": model,
        "dtype": dtype,
    }


class _Numbered(RankedBackend):
    """One of several engines that the same ranks hold."""

    def __init__(self, local: TorchBackend, ranks: Ranks, number: int) -> None:
        super().__init__(local, ranks)
        self.local, self._number = local, number

    def _tell(self, call: str, *arguments: Any) -> None:
        self._ranks.broadcast(msgpack.packb([self._number, call, list(arguments)]))


@dataclass
class TwoRanks:
    """Makes engines on both ranks."""

    group: RankGroup
    count: int = 0

    def make(self, spec: dict[str, Any], *, keeps_gradients: bool = False) -> _Numbered:
        """A fresh engine of ``spec`` on the two ranks; with gradients to be kept here too, which
        takes both ranks."""
        self.group.ranks.broadcast(msgpack.packb([-1, "make", [spec, keeps_gradients]]))
        made = _Numbered(build(spec, self.group), self.group.ranks, self.count)
        self.count += 1
        return made

    def leave(self) -> None:
        """Let the child leave."""
        self.group.ranks.broadcast(msgpack.packb([-1, "leave", []]))


@contextmanager
def two_ranks(folder: Path, device: str = "cpu") -> Iterator[TwoRanks]:
    """Both ranks for the length of a test module; ``cuda``: on a GPU each, by NCCL."""
    store = folder / "store"
    child = subprocess.Popen([sys.executable, "-m", "tests.learner.ranks_kit", str(store), device])
    try:
        ranks = TwoRanks(_join(store, 0, device))
        yield ranks
        ranks.leave()
        assert child.wait(timeout=30) == 0
    finally:
        child.kill()
        child.wait()
        leave_group()


def leave_group() -> None:
    """End the default process group, so that the next module may have another one."""
    if (comm := sys.modules.get("deepspeed.comm.comm")) is not None and comm.cdb is not None:
        comm.destroy_process_group()
        comm.__dict__["cdb"] = None
        # It numbers a process's parameters and modules, and compares the numbers between ranks.
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
        from deepspeed.runtime.zero.partition_parameters import Init

        Init.param_id = 0
        DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    if dist.is_initialized():
        dist.destroy_process_group()


def keep_gradients(backend: TorchBackend) -> dict[str, Tensor]:
    """The gradients of the first of the next updates, whole, before clipping, by name; filled as
    it steps. All ranks must ask."""
    kept: dict[str, Tensor] = {}
    step = backend._step

    def keep_and_step(lr: float) -> float:
        for name, parameter in backend.model.named_parameters():
            gradient = _gradient(backend, parameter)
            if gradient is not None:
                kept.setdefault(name, gradient.detach().clone())
        return step(lr)

    backend.__dict__["_step"] = keep_and_step
    return kept


def _gradient(backend: TorchBackend, parameter: nn.Parameter) -> Tensor | None:
    if isinstance(backend, DeepSpeedBackend):
        from deepspeed.utils import safe_get_full_grad

        whole: Tensor | None = safe_get_full_grad(parameter) if parameter.requires_grad else None
        return whole
    gradient = parameter.grad
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def _join(store: Path, rank: int, device: str) -> RankGroup:
    place = resolve_device(f"cuda:{rank}" if device == "cuda" else device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=RANKS,
        timeout=_TIMEOUT,
        device_id=place if device == "cuda" else None,
    )
    return RankGroup.form(place, _TIMEOUT)


def main(store: Path, device: str) -> None:
    """Rank 1: make engines and the calls on them, as rank 0 says."""
    torch.set_num_threads(1)
    group = _join(store, 1, device)
    backends: list[TorchBackend] = []
    while True:
        number, call, arguments = msgpack.unpackb(group.ranks.broadcast(None))
        if call == "leave":
            os._exit(0)  # as a rank does: see ``learner.__main__._left``
        if call == "make":
            backends.append(build(arguments[0], group))
            if arguments[1]:
                keep_gradients(backends[-1])
            continue
        with suppress(RingError):  # rank 0 has it too, and its test looks at it
            make_call(backends[number], call, arguments)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
