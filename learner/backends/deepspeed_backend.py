"""The train engine on DeepSpeed: ZeRO 0 to 3, on one or several ranks.

All but what is sharded and how it steps is that of ``TorchBackend``: batches, losses, forwards
(fp32 weights, in bfloat16 under autocast), the names and the format of checkpoints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learner.backends.accumulation import no_step
from learner.backends.sharding import RankGroup
from learner.backends.tensor_files import read_tensors
from learner.backends.token_scores import Scores, TokenScores
from learner.backends.torch_backend import TorchBackend
from learner.backends.torch_state import (
    check_state,
    import_rest,
    import_state,
    make_optimizer,
    rest_of_state,
)
from learner.backends.zero_engine import EngineScores, make_engine
from learner.backends.zero_state import common_step, export_zero, import_zero
from ringasync.errors import CheckpointError
from ringasync.runtime import crashpoints


class DeepSpeedBackend(TorchBackend):
    """``Backend`` whose optimizer state, gradients and weights DeepSpeed shards.

    All ranks of the default process group make it together, and every call on it.
    """

    _engine: Any

    def _distribute(self, scores: TokenScores, group: RankGroup | None) -> Scores:
        learner = self._settings.learner
        self._stage = learner.zero_stage_of_deepspeed
        self._params = [each for each in self._model.parameters() if each.requires_grad]
        fused = self._device.type == "cuda" and not learner.offload_optimizer
        self._optimizer = make_optimizer(self._params, learner, fused=fused)
        self._engine = make_engine(self._model, scores, self._optimizer, learner, self._device)
        self._backward = self._add_gradient
        self._terms.move(self._device)
        return EngineScores(self._engine, scores)

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimizer, which steps this rank's partitions; at stage 0 there is none."""
        return self._engine.optimizer

    def _add_gradient(self, loss: Tensor, is_last: bool) -> None:
        # Gradients of the ranks are averaged when it was the last (ZeRO 2 and 3: each time).
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def _step(self, lr: float) -> float:
        norm = self._clip_gradients() if self._stage == 0 else 0.0
        for group in self._zero.param_groups:
            group["lr"] = lr
        crashpoints.reach("stepping", self._updates)
        self._engine.step()
        if self._stage == 0:
            return norm
        norm = float(self._engine.get_global_grad_norm())
        if self._zero.overflow:  # then it has thrown the gradients away
            raise no_step(norm)
        return norm

    def _begin_update(self) -> None:
        """Nothing: no rank can drop gradients alone; an update that broke off ends them all."""

    def _drop_gradients(self) -> None:
        """DeepSpeed throws away gradients whose norm is not finite, so it is told that it is not;
        they lie in buckets and partitions that nothing else empties."""
        if self._stage == 0:
            self._optimizer.zero_grad(set_to_none=True)
            return
        invalid = torch.tensor(float("nan"))
        name = "_get_norm_groups" if self._stage == 3 else "scaled_global_norm"
        setattr(self._zero, name, lambda: [invalid] if self._stage == 3 else invalid)
        try:
            self._engine.step()
        finally:
            delattr(self._zero, name)

    def state_dict(self) -> dict[str, Tensor]:
        """All state by flat name, each tensor on one of the ranks."""
        if self._stage == 0:
            return super().state_dict()
        state = export_zero(self._model, self._zero, self._ranks)
        if self._ranks.rank == 0:
            state |= rest_of_state(self._updates, self._device)
        return state

    def load(self, directory: Path) -> None:
        """See ``Backend.load``. Every rank reads all of it into main memory."""
        problem: CheckpointError | None = None
        state: dict[str, Tensor] = {}
        try:
            state = read_tensors(directory)
            check_state(self._model, state)
            common_step(state)
        except CheckpointError as error:
            problem = error
        self._ranks.agree(problem)
        if self._stage == 0:
            self._updates = import_state(self._model, self._optimizer, state, self._device)
            return
        import_zero(self._model, self._zero, state, self._device)
        self._updates = import_rest(state, self._device)

    def offload(self) -> None:
        """Nothing leaves: ``schedule.colocated`` is refused for this engine."""

    def onload(self) -> None:
        """See ``offload``."""
