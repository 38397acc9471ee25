"""Two ranks on the CPU: the test's process is rank 0, a child that lives as long is rank 1.

As a module it is the child: ``STORE``.
"""

from __future__ import annotations

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
from torch import Tensor
from torch.distributed.tensor import DTensor

from learner.backends.ranked import RankedBackend, make_call
from learner.backends.ranks import Ranks
from learner.backends.sharding import RankGroup
from learner.backends.torch_backend import TorchBackend, TorchSettings
from ringasync.config.schema import LearnerConfig, LossConfig
from ringasync.errors import RingError

from .kit import tiny_model
from .moe_kit import tiny_moe

RANKS = 2
_TIMEOUT = timedelta(seconds=30)
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
    return TorchBackend(make[spec["model"]](), settings, group=group)


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
def two_ranks(folder: Path) -> Iterator[TwoRanks]:
    """Both ranks for the length of a test module."""
    store = folder / "store"
    child = subprocess.Popen([sys.executable, "-m", "tests.learner.ranks_kit", str(store)])
    try:
        ranks = TwoRanks(_join(store, 0))
        yield ranks
        ranks.leave()
        assert child.wait(timeout=30) == 0
    finally:
        child.kill()
        child.wait()
        dist.destroy_process_group()


def keep_gradients(backend: TorchBackend) -> dict[str, Tensor]:
    """What the next updates step with, whole, by name; filled as they do. All ranks must ask."""
    kept: dict[str, Tensor] = {}

    def keep(*_: Any) -> None:
        for name, parameter in backend.model.named_parameters():
            if (gradient := parameter.grad) is not None:
                whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
                kept.setdefault(name, whole.detach().clone())

    backend._optimizer.register_step_pre_hook(keep)
    return kept


def _join(store: Path, rank: int) -> RankGroup:
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=_TIMEOUT
    )
    return RankGroup.form(torch.device("cpu"), _TIMEOUT)


def main(store: Path) -> None:
    """Rank 1: make engines and the calls on them, as rank 0 says."""
    torch.set_num_threads(1)
    group = _join(store, 1)
    backends: list[TorchBackend] = []
    while True:
        number, call, arguments = msgpack.unpackb(group.ranks.broadcast(None))
        if call == "leave":
            return
        if call == "make":
            backends.append(build(arguments[0], group))
            if arguments[1]:
                keep_gradients(backends[-1])
            continue
        with suppress(RingError):  # rank 0 has it too, and its test looks at it
            make_call(backends[number], call, arguments)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
