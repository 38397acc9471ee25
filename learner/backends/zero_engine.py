"""DeepSpeed's engine around a policy: how it is set up, and how token scores go through it."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from learner.backends.collate import Positions
from learner.backends.token_scores import TokenScores
from ringasync.config.schema import LearnerConfig
from ringasync.errors import ConfigError

_ACCUMULATION = 2
"""Any number above 1: DeepSpeed then adds up whatever comes until it is told that it was the last.
Losses are not divided by it (``scale_wrt_gas``)."""
_BUCKET_VALUES = 500_000_000
"""DeepSpeed's own size of what gradients are gathered in before they are reduced."""


def require_deepspeed() -> None:
    """Raises ``ConfigError`` where the package is not installed."""
    if find_spec("deepspeed") is None:
        raise ConfigError(
            "learner.backend = 'deepspeed' needs the package deepspeed, which is not installed: "
            "install ringasync[deepspeed] (docs/installing.md), or set learner.backend = 'torch'; "
            "a run may go on with either"
        )


class _Policy(nn.Module):
    """A model whose forward is a call of ``TokenScores``, so that the engine sees where the use of
    its parameters begins and ends."""

    def __init__(self, model: nn.Module, scores: TokenScores) -> None:
        super().__init__()
        self.model = model
        self._scores = scores
        self.train(model.training)

    def forward(self, call: str, *arguments: Any, **options: Any) -> Any:
        """``call``: the name of a method of ``TokenScores``."""
        return getattr(self._scores, call)(*arguments, **options)


class EngineScores:
    """``TokenScores`` by way of the engine."""

    def __init__(self, engine: nn.Module, scores: TokenScores) -> None:
        self._engine = engine
        self.chunk_tokens = scores.chunk_tokens

    def score(
        self,
        wanted: Positions,
        temperature: float,
        *,
        entropy: bool = False,
        entropy_gradient: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """See ``TokenScores.score``."""
        result: tuple[Tensor, Tensor] = self._engine(
            "score", wanted, temperature, entropy=entropy, entropy_gradient=entropy_gradient
        )
        return result

    def logits(self, wanted: Positions) -> Tensor:
        """See ``TokenScores.logits``."""
        result: Tensor = self._engine("logits", wanted)
        return result


def make_engine(
    model: nn.Module,
    scores: TokenScores,
    optimizer: torch.optim.Optimizer,
    learner: LearnerConfig,
    device: torch.device,
) -> Any:
    """DeepSpeed's engine on ``model``, of which it holds shards from now on.

    A call of all ranks of the default process group, which one rank alone makes here.
    """
    require_deepspeed()
    # Read at the first import: a host with GPUs may train on its CPU.
    os.environ["DS_ACCELERATOR"] = device.type
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    os.environ["LOCAL_RANK"] = str(device.index if device.type == "cuda" else dist.get_rank())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its import, about names that torch has given up
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # An operator that the CPU's own collectives would build with a compiler; gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)
        engine, *_ = deepspeed.initialize(
            model=_Policy(model, scores),
            optimizer=optimizer,
            config=_settings(learner, sum(one.numel() for one in model.parameters())),
            dist_init_required=False,
        )
    # The same, from its collectives, in every step.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    return engine


def _settings(learner: LearnerConfig, parameters: int) -> dict[str, Any]:
    stage = learner.zero_stage_of_deepspeed
    zero: dict[str, Any] = {
        "stage": stage,
        # What stays whole at stage 3: DeepSpeed's own limit, and in small models next to nothing.
        "stage3_param_persistence_threshold": min(100_000, parameters // 1000),
        # Buffers of that many values are made at once, whatever the model's size.
        "reduce_bucket_size": min(_BUCKET_VALUES, parameters),
        "allgather_bucket_size": min(_BUCKET_VALUES, parameters),
    }
    if learner.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": _ACCUMULATION,
        # At stage 0 the gradients are torch's own and clipped by it, which also tells their norm.
        "gradient_clipping": learner.grad_clip if stage else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "steps_per_print": sys.maxsize,
    }
