"""What a train engine must do. One process here; ranks of a sharded engine fit the same calls.

Every call is made by one thread at a time. With several ranks each rank makes the same calls with
the same arguments (a batch is a pure function of the journal record); ``begin_save`` and ``load``
then work on the ranks' shards, and ``save_hf`` writes from rank 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from learner.algorithms.metrics import TokenStats
from learner.batch import TrainBatch


@dataclass(frozen=True, slots=True)
class ScoredSequence:
    """Tokens whose log-probs are wanted, given ``prompt_ids`` (at least one id)."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """What one batch did. ``loss`` and ``grad_norm`` are of the first update of the batch.

    ``loss`` is the exact sum over the batch divided by the normaliser; ``grad_norm`` is before
    clipping; ``lr`` is that of the last update. ``tokens`` has one entry for each trained token.
    ``terms``: the parts of ``loss`` by metric name, each before its coefficient, also of the first
    update; empty where the policy loss is all there is. ``seconds``: by ``forward``, ``backward``
    and ``optimizer``, of all updates.
    """

    loss: float
    grad_norm: float
    lr: float
    updates: int
    tokens: TokenStats
    terms: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


class Backend(Protocol):
    """A train engine: the policy, its optimizer and its learning-rate schedule."""

    def train_batch(self, batch: TrainBatch) -> StepResult:
        """Run all updates of one batch.

        The loss is exactly sum / normaliser of the whole batch however it is split. Raises
        ``NonFiniteLogprobError`` (it names the rollout) or ``TrainingError`` before the optimizer
        changes anything.
        """
        ...

    def logprobs(
        self, sequences: Sequence[ScoredSequence], *, temperature: float
    ) -> list[npt.NDArray[np.float32]]:
        """Log-probs float32 [T] of each sequence's ``token_ids`` under the present weights."""
        ...

    def sample(self, num_sequences: int, num_tokens: int, seed: int) -> list[ScoredSequence]:
        """Draw sequences from the policy at T = 1, for a canary before any batch exists.

        Changes no state: the same ``seed`` under the same weights gives the same tokens.
        """
        ...

    def begin_save(self, directory: Path) -> Future[None]:
        """Copy all state, then write the copy under ``directory`` in the background.

        The next batch may be trained as soon as this returns. One format for all engines, see
        ``tensor_files``. The future ends when every rank's tensors are written and fsynced; it
        raises ``CheckpointError``. A save that is still under way is waited for.
        """
        ...

    def load(self, directory: Path) -> None:
        """Restore, bit for bit, what any engine saved under ``directory``.

        Raises ``CheckpointError`` when it is damaged or of another model; nothing is changed then.
        """
        ...

    def offload(self) -> None:
        """Leave the device: all state goes to main memory, caches are dropped, values stay.

        ``begin_save``, ``load`` and ``save_hf`` work there too.
        """
        ...

    def onload(self) -> None:
        """Come back to the device. Both may be called twice."""
        ...

    def save_hf(self, directory: Path) -> None:
        """Write the policy as an HF-format folder: ``config.json``, ``model*.safetensors``.

        Raises ``EnvironmentRefusedError`` when the disk refuses; all ranks are in step then.
        """
        ...

    def begin_export(self, directory: Path) -> Future[None]:
        """Copy the weights, then write the copy as ``save_hf`` does, in the background.

        The next batch may be trained as soon as this returns. The future of rank 0 ends when the
        folder is whole, and raises what ``save_hf`` does; so does this, on all ranks, when main
        memory does not suffice. An export that is still under way is waited for.
        """
        ...
