"""What a simulated run has instead of a model and of verifier processes; nothing else is replaced.

The train engine counts what it trained, so that its weights say which batches are in them, and
saves scripted weights, so that the scripted engine's log-probs can be checked to the token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from learner.algorithms.metrics import TokenStats
from learner.backends.base import ScoredSequence, StepResult
from learner.batch import TrainBatch
from ringasync.errors import VerifierError
from ringasync.rewards.pool import PoolStats
from workers.engines.scripted import VOCAB_SIZE, scripted_logprobs, write_scripted_weights

Tensors = dict[str, npt.NDArray[np.generic]]


def tensors_of(updates: int) -> Tensors:
    """Scripted weights after so many batches, as ``write_scripted_weights`` makes them."""
    value = float(updates)
    return {
        "model.scale": np.asarray([value], dtype=np.float32),
        "model.table": np.full((4, 8), value, dtype=np.float32),
    }


class CountingBackend:
    """Implements ``learner.backends.base.Backend``; ``trained`` is its whole state.

    One entry a batch: its id and the trained tokens of each rollout.
    """

    def __init__(self) -> None:
        self.trained: list[tuple[str, dict[str, int]]] = []

    def train_batch(self, batch: TrainBatch) -> StepResult:
        """See ``Backend.train_batch``."""
        rows = {item.trajectory.rollout_id: item.trained_tokens for item in batch.items}
        self.trained.append((batch.batch_id, rows))
        versions = [i.trajectory.policy_versions[: i.trained_tokens] for i in batch.items]
        ages = np.asarray([batch.ages[int(v)] for part in versions for v in part], np.int64)
        size = ages.shape[0]
        none = np.zeros(size, np.bool_)
        stats = TokenStats(np.zeros(size), np.ones(size), ages, none, np.zeros(size))
        return StepResult(0.0, 1.0, 0.0, 1, stats)

    def logprobs(
        self, sequences: Sequence[ScoredSequence], *, temperature: float
    ) -> list[npt.NDArray[np.float32]]:
        """See ``Backend.logprobs``."""
        tensors = tensors_of(len(self.trained))
        return [
            np.asarray(
                [
                    scripted_logprobs(tensors, [*s.prompt_ids, *s.token_ids[:i]], temperature)[t]
                    for i, t in enumerate(s.token_ids)
                ],
                np.float32,
            )
            for s in sequences
        ]

    def sample(self, num_sequences: int, num_tokens: int, seed: int) -> list[ScoredSequence]:
        """See ``Backend.sample``."""
        drawn = np.random.default_rng(seed).integers(0, VOCAB_SIZE, (num_sequences, 4))
        return [ScoredSequence((1,), tuple(int(token) for token in row)) for row in drawn]

    def begin_save(self, directory: Path) -> Future[None]:
        """See ``Backend.begin_save``."""
        directory.mkdir(parents=True)
        (directory / "trained.json").write_text(json.dumps(self.trained), encoding="utf-8")
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def load(self, directory: Path) -> None:
        """See ``Backend.load``."""
        rows = json.loads((directory / "trained.json").read_text(encoding="utf-8"))
        self.trained = [(batch_id, trained) for batch_id, trained in rows]

    def offload(self) -> None:
        """See ``Backend.offload``. There is no device."""

    def onload(self) -> None:
        """See ``Backend.onload``."""

    def save_hf(self, directory: Path) -> None:
        """See ``Backend.save_hf``."""
        write_scripted_weights(directory, float(len(self.trained)))

    def begin_export(self, directory: Path) -> Future[None]:
        """See ``Backend.begin_export``."""
        self.save_hf(directory)
        done: Future[None] = Future()
        done.set_result(None)
        return done


class HashVerifier:
    """In the place of ``VerifierPool``: the reward is a hash; one answer in 48 has no verdict."""

    not_isolated = ""

    def __init__(self, *_args: Any, **_options: Any) -> None:
        self.stats = PoolStats()

    def refusal(self, _verifier: str) -> str | None:
        """Nothing is refused."""
        return None

    async def verify(self, task: dict[str, Any], response: str) -> float:
        """One of eight rewards, fixed by prompt and response."""
        digest = xxhash.xxh32_intdigest(f"{task}{response}".encode())
        if digest % 48 == 0:
            self.stats.errors += 1
            raise VerifierError("this answer cannot be judged")
        self.stats.verdicts += 1
        return digest % 8 / 8

    async def close(self) -> None:
        """Nothing to end."""
