"""The step that one writes first: transformers and DeepSpeed on padded rows, all logits."""

from __future__ import annotations

import os
import socket
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learner.algorithms.metrics import TokenStats
from learner.backends.base import StepResult
from learner.backends.collate import MicroBatch, collate
from learner.backends.step_timer import StepTimer
from learner.batch import TrainBatch
from ringasync.config.schema import LearnerConfig


class NaiveStep:
    """ZeRO-1 on one rank; bf16 weights where ``dtype`` is that, with DeepSpeed's fp32 master."""

    def __init__(self, model: Any, learner: LearnerConfig, dtype: torch.dtype) -> None:
        """Starts a process group of one."""
        import deepspeed

        self._learner = learner
        self._device = next(model.parameters()).device
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in alone.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        cuda = self._device.type == "cuda"
        deepspeed.init_distributed("nccl" if cuda else "gloo")
        if learner.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # it has no dropout; transformers checkpoints only then
        optimizer = torch.optim.AdamW(model.parameters(), lr=learner.lr)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "zero_optimization": {"stage": 1},
                "bf16": {"enabled": dtype == torch.bfloat16},
                "gradient_clipping": learner.grad_clip,
                "zero_allow_untested_optimizer": True,
            },
        )

    def train_batch(self, batch: TrainBatch) -> StepResult:
        """One update; the loss is the policy gradient's, as the learner's without a mismatch."""
        timer = StepTimer(self._device)
        micros = [
            micro.to(self._device)
            for micro in collate(
                batch,
                microbatch_tokens=self._learner.microbatch_tokens,
                normalizer="budget",
            )
        ]
        total = 0.0
        for number, micro in enumerate(micros):
            self._engine.set_gradient_accumulation_boundary(number == len(micros) - 1)
            with timer.part("forward"):
                loss = self._loss(micro)
            with timer.part("backward"):
                self._engine.backward(loss)
            with timer.part("optimizer"):
                self._engine.step()
            total += float(loss.detach())
        empty = np.zeros(0)
        stats = TokenStats(empty, empty, empty.astype(np.int64), empty.astype(np.bool_), empty)
        return StepResult(total, 0.0, self._learner.lr, 1, stats, {}, timer.seconds())

    def _loss(self, micro: MicroBatch) -> Tensor:
        ends = torch.zeros(micro.input_ids.shape[0], dtype=torch.int64, device=self._device)
        ends = ends.scatter_reduce(0, micro.rows, micro.columns + 1, "amax")
        width = torch.arange(micro.input_ids.shape[1], device=self._device)
        mask = (width[None] <= ends[:, None]).long()
        logits = self._engine(
            input_ids=micro.input_ids, attention_mask=mask, use_cache=False
        ).logits
        every = logits[:, :-1].float().log_softmax(-1)
        chosen = every.gather(-1, micro.input_ids[:, 1:, None]).squeeze(-1)
        policy = chosen[micro.rows, micro.columns]
        ratio = (policy - policy.detach()).exp()
        loss: Tensor = -(ratio * micro.advantages * micro.inverse_denominators).sum()
        return loss
