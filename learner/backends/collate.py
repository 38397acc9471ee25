"""Batch to padded micro-batches. Shape legend: B rows, L padded length, N trained tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from learner.algorithms.policy_loss import Normalizer, token_denominators
from learner.backends.routing_replay import pad_routing
from learner.batch import BatchItem, TrainBatch
from ringasync.errors import NonFiniteLogprobError


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """Rows padded on the right, and the N trained tokens, row by row, in order.

    ``input_ids`` int64 [B, L] (causal models need no mask for padding on the right: no real token
    looks at it). ``rows`` and ``columns`` int64 [N] say where in the logits a token is predicted;
    ``targets`` int64 [N] is that token. The other [N] tensors follow it: ``behavior_logprobs``,
    ``advantages``, ``inverse_denominators`` float32, ``ages`` int64. ``owners`` names the rollout
    of each row. ``routed_experts`` int32 [B, L, layers, experts a token] says which experts ran at
    each input position, -1 where that is not known; None where nothing is to be replayed.
    """

    input_ids: Tensor
    rows: Tensor
    columns: Tensor
    targets: Tensor
    behavior_logprobs: Tensor
    advantages: Tensor
    inverse_denominators: Tensor
    ages: Tensor
    owners: tuple[str, ...]
    routed_experts: Tensor | None = None

    def nonfinite(self, logprobs: Tensor, whose: str) -> NonFiniteLogprobError | None:
        """The error that NaN or infinite values among ``logprobs`` [N] are, None without any."""
        bad = ~torch.isfinite(logprobs.detach())
        if not bool(bad.any()):
            return None
        return NonFiniteLogprobError(
            f"{whose} gave a non-finite log-prob at {int(bad.sum())} trained tokens, the first in "
            f"rollout {self.owners[int(self.rows[bad][0])]}; the optimizer step was not made"
        )

    def without_weight(self) -> MicroBatch:
        """The same with denominators that take it out of every sum."""
        return replace(self, inverse_denominators=torch.zeros_like(self.inverse_denominators))

    def to(self, device: torch.device) -> MicroBatch:
        """The same on ``device``."""
        return MicroBatch(
            self.input_ids.to(device),
            self.rows.to(device),
            self.columns.to(device),
            self.targets.to(device),
            self.behavior_logprobs.to(device),
            self.advantages.to(device),
            self.inverse_denominators.to(device),
            self.ages.to(device),
            self.owners,
            None if self.routed_experts is None else self.routed_experts.to(device),
        )


def collate(
    batch: TrainBatch,
    *,
    microbatch_tokens: int,
    normalizer: Normalizer,
    pad_id: int = 0,
    routing: bool = False,
) -> list[MicroBatch]:
    """Split a batch into micro-batches of at most ``microbatch_tokens`` padded tokens.

    A row longer than that is alone in its micro-batch. Rows are sorted by length, so little is
    padded; they end at their last trained token. Denominators are those of the whole batch, so the
    sum over micro-batches is exact whatever the split. ``routing``: with the recorded experts.
    """
    lengths = [item.trajectory.num_policy_tokens for item in batch.items]
    denominators = token_denominators(
        normalizer, budget_tokens=batch.budget_tokens, sequence_tokens=lengths
    )
    entries = [
        (item, denominator)
        for item, denominator in zip(batch.items, denominators, strict=True)
        if item.trained_tokens > 0
    ]
    sizes = [_row_tokens(item) for item, _ in entries]
    return [
        _collate_rows([entries[index] for index in chosen], batch, pad_id, routing)
        for chosen in plan_microbatches(sizes, microbatch_tokens)
    ]


def plan_microbatches(sizes: Sequence[int], microbatch_tokens: int) -> list[list[int]]:
    """Indices of rows by micro-batch, longest rows first: rows x longest <= the limit."""
    plan: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(sizes)), key=lambda one: (-sizes[one], one)):
        if plan and (len(plan[-1]) + 1) * longest <= microbatch_tokens:
            plan[-1].append(index)
        else:
            plan.append([index])
            longest = sizes[index]
    return plan


def pad_rows(rows: Sequence[Sequence[int] | np.ndarray], pad_id: int = 0) -> Tensor:
    """int64 [B, L], padded on the right."""
    width = max(len(row) for row in rows)
    padded = np.full((len(rows), width), pad_id, dtype=np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return torch.from_numpy(padded)


def _row_tokens(item: BatchItem) -> int:
    return int(item.trajectory.prompt_ids.shape[0]) + item.scored_tokens


def _collate_rows(
    entries: Sequence[tuple[BatchItem, float]], batch: TrainBatch, pad_id: int, routing: bool
) -> MicroBatch:
    inputs: list[np.ndarray] = []
    parts: list[tuple[np.ndarray, ...]] = []
    for row, (item, denominator) in enumerate(entries):
        trajectory = item.trajectory
        prompt = int(trajectory.prompt_ids.shape[0])
        response = trajectory.token_ids[: item.scored_tokens]
        inputs.append(np.concatenate([trajectory.prompt_ids, response]))
        offsets = np.flatnonzero(item.trained_mask)
        count = offsets.shape[0]
        versions = trajectory.policy_versions[offsets]
        parts.append(
            (
                np.full(count, row, np.int64),
                prompt + offsets - 1,  # the logits at a position predict the next token
                response[offsets].astype(np.int64),
                trajectory.behavior_logprobs[offsets],
                np.full(count, item.advantage, np.float32),
                np.full(count, 1.0 / denominator, np.float32),
                np.array([batch.ages.get(int(one), 0) for one in versions], np.int64),
            )
        )
    joined = [torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True)]
    rows, columns, targets, behavior, advantages, inverse, ages = joined
    input_ids = pad_rows(inputs, pad_id)
    recorded = [item.trajectory.routed_experts if routing else None for item, _ in entries]
    experts = pad_routing(recorded, input_ids.shape[1])
    return MicroBatch(
        input_ids,
        rows,
        columns,
        targets,
        behavior,
        advantages,
        inverse,
        ages,
        tuple(item.trajectory.rollout_id for item, _ in entries),
        None if experts is None else torch.from_numpy(experts),
    )
