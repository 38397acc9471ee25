"""A model over several ranks by FSDP2: every rank holds a shard of each parameter and its moments.

Around the forward and the backward of a layer its parameters are whole, then gone again.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from learner.backends.collate import Positions
from learner.backends.ranks import Ranks
from learner.backends.token_scores import TokenScores
from learner.devices import resolve_device, settled
from ringasync.config.schema import LearnerConfig
from ringasync.errors import ConfigError

_NEVER = timedelta(days=365)
"""Ranks wait for the next command for as long as the learner waits for groups; a rank that died is
the launcher's to find, so no time limit of a collective is."""


@dataclass(frozen=True, slots=True)
class RankGroup:
    """The process groups of a learner's ranks: ``mesh`` for tensors of the model, ``ranks`` for
    commands and sums, ``saving`` and ``exporting`` for the threads that write checkpoints and
    versions."""

    mesh: DeviceMesh
    device: torch.device
    ranks: Ranks
    saving: ProcessGroup
    exporting: ProcessGroup

    @classmethod
    def join(cls, learner: LearnerConfig) -> RankGroup:
        """Find the other ranks by torchrun's environment; returns when all are there.

        Raises ``ConfigError``: another number of ranks was started, or the GPUs do not suffice.
        """
        rank, started = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
        if started != learner.ranks:
            raise ConfigError(
                f"learner.ranks = {learner.ranks}, but {started} ranks were started: start them "
                "by `ringasync up` or `ringasync learner`, which start as many as that says"
            )
        name = settled(learner.device)
        device = resolve_device(
            f"cuda:{rank}" if name == "cuda" else name, f"learner.ranks = {started}: rank {rank}"
        )
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, timeout=_NEVER, device_id=device if device.type == "cuda" else None
        )
        return cls.form(device)

    @classmethod
    def form(cls, device: torch.device, timeout: timedelta = _NEVER) -> RankGroup:
        """The groups of all ranks of this process's default group."""
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        commands, saving, exporting = (
            cast(ProcessGroup, dist.new_group(backend="gloo", timeout=timeout)) for _ in range(3)
        )
        return cls(mesh, device, Ranks(commands), saving, exporting)


class ShardedScores:
    """``TokenScores`` of a sharded model.

    ``score`` calls body and head apart, past the model's own forward: parameters that belong to no
    layer are gathered around it as around a forward.
    """

    def __init__(self, model: Any, scores: TokenScores) -> None:
        self._scores = scores
        self._score = scores.score
        if scores.chunk_tokens:
            model.ringasync_score = scores.score
            register_fsdp_forward_method(model, "ringasync_score")
            self._score = model.ringasync_score

    @property
    def chunk_tokens(self) -> int:
        """See ``TokenScores.chunk_tokens``."""
        return self._scores.chunk_tokens

    def score(
        self,
        wanted: Positions,
        temperature: float,
        *,
        entropy: bool = False,
        entropy_gradient: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """See ``TokenScores.score``."""
        return self._score(wanted, temperature, entropy=entropy, entropy_gradient=entropy_gradient)

    def logits(self, wanted: Positions) -> Tensor:
        """See ``TokenScores.logits``, which calls the whole model."""
        return self._scores.logits(wanted)


def shard(model: nn.Module, scores: TokenScores, group: RankGroup) -> ShardedScores:
    """Shard ``model`` (whole, in main memory) over the ranks in place, layer by layer onto their
    devices; returns what scores it from then on."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    for module in list(model.modules()):
        if type(module).__name__ in names:
            fully_shard(module, mesh=group.mesh)
    # Resharded too: what stays whole after a forward without backward is stale after a step.
    fully_shard(model, mesh=group.mesh, reshard_after_forward=True)
    return ShardedScores(model, scores)


def placements(model: nn.Module) -> dict[str, DTensor]:
    """The sharded parameters by name, tied ones once."""
    return {name: one for name, one in model.named_parameters() if isinstance(one, DTensor)}
