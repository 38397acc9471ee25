"""Batch to micro-batches, packed or padded.

Shape legend: B rows (1 when packed), L length of a row, N trained tokens, S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learner.algorithms.balance import plan
from learner.algorithms.policy_loss import Normalizer, token_denominators
from learner.backends.packing import Attention, Packing
from learner.backends.routing_replay import pad_routing
from learner.batch import BatchItem, TrainBatch
from ringasync.errors import NonFiniteLogprobError


@dataclass(frozen=True, slots=True, eq=False)
class Positions:
    """Which tokens are wanted: ``input_ids`` int64 [B, L]; the rest int64 [N].

    ``rows`` and ``columns`` say where ``targets`` are predicted. ``packing``: where the sequences
    of a packed row begin; then B is 1. ``widest``: the largest N of those that the ranks score at
    the same time; whoever has fewer runs the LM head as often as it.
    """

    input_ids: Tensor
    rows: Tensor
    columns: Tensor
    targets: Tensor
    packing: Packing | None = None
    widest: int = 0

    @property
    def inputs(self) -> dict[str, Any]:
        """What the forward of a model takes."""
        packed = {} if self.packing is None else self.packing.arguments()
        return {"input_ids": self.input_ids, "use_cache": False, **packed}


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """Sequences, and their N trained tokens, sequence by sequence, in order.

    With ``packing`` they stand one behind the other in a single row, without padding. Without, each
    is a row padded on the right.

    ``input_ids`` int64 [B, L] (causal models need no mask for padding on the right: no real token
    looks at it). ``rows`` and ``columns`` int64 [N] say where in the logits a token is predicted;
    ``targets`` int64 [N] is that token. The other [N] tensors follow it: ``behavior_logprobs``,
    ``advantages``, ``inverse_denominators`` float32, ``ages`` int64. ``owners`` names the rollout
    of each sequence. ``routed_experts`` int32 [B, L, layers, experts a token] says which experts
    ran at each input position, -1 where that is not known; None: nothing is to be replayed.
    ``is_filler``: it only keeps a rank in step with the others and counts in nothing. ``widest``:
    see ``Positions``.
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
    packing: Packing | None = None
    is_filler: bool = False
    widest: int = 0

    @property
    def positions(self) -> Positions:
        """Its trained tokens as positions to score."""
        return Positions(
            self.input_ids, self.rows, self.columns, self.targets, self.packing, self.widest
        )

    def nonfinite(self, logprobs: Tensor, whose: str) -> NonFiniteLogprobError | None:
        """The error that NaN or infinite values among ``logprobs`` [N] are, None without any."""
        bad = ~torch.isfinite(logprobs.detach())
        if not bool(bad.any()):
            return None
        return NonFiniteLogprobError(
            f"{whose} gave a non-finite log-prob at {int(bad.sum())} trained tokens, the first in "
            f"rollout {self._owner(int(bad.nonzero()[0]))}; the optimizer step was not made"
        )

    def _owner(self, token: int) -> str:
        if self.packing is None:
            return self.owners[int(self.rows[token])]
        return self.owners[self.packing.sequence_at(int(self.columns[token]))]

    def without_weight(self) -> MicroBatch:
        """The same with denominators that take it out of every sum."""
        zeros = torch.zeros_like(self.inverse_denominators)
        return replace(self, inverse_denominators=zeros, is_filler=True)

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
            None if self.packing is None else self.packing.to(device),
            self.is_filler,
            self.widest,
        )


def collate(
    batch: TrainBatch,
    *,
    microbatch_tokens: int,
    normalizer: Normalizer,
    pad_id: int = 0,
    routing: bool = False,
    packing: Attention | None = None,
    ranks: int = 1,
) -> list[MicroBatch]:
    """Split a batch into micro-batches of at most ``microbatch_tokens`` tokens, padding included.

    A sequence longer than that is alone in its micro-batch. Sequences end at their last trained
    token. ``packing``: they are packed, for that attention; without, padded, sorted by length so
    that little is. Denominators are those of the whole batch, so the
    sum over micro-batches is exact whatever the split. ``routing``: with the recorded experts.
    ``ranks``: equally many for each, in turn (``Ranks.share``), by ``balance.plan``.
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
    shares = plan(sizes, ranks, microbatch_tokens, padded=packing is None)
    made = [
        _collate_rows([entries[index] for index in one], batch, pad_id, routing, packing)
        if one
        else None
        for in_turn in zip(*shares, strict=True)
        for one in in_turn
    ]
    real = [one for one in made if one is not None]
    # The shortest, for it is run in vain.
    filler = min(real, key=lambda one: one.input_ids.numel()).without_weight() if real else None
    return [one for one in (each or filler for each in made) if one is not None]


def plan_microbatches(sizes: Sequence[int], microbatch_tokens: int) -> list[list[int]]:
    """Indices of rows by micro-batch, longest rows first: rows x longest <= the limit."""
    (chosen,) = plan(sizes, 1, microbatch_tokens, padded=True)
    return chosen


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
    entries: Sequence[tuple[BatchItem, float]],
    batch: TrainBatch,
    pad_id: int,
    routing: bool,
    attention: Attention | None,
) -> MicroBatch:
    inputs: list[np.ndarray] = []
    parts: list[tuple[np.ndarray, ...]] = []
    begin = 0
    for row, (item, denominator) in enumerate(entries):
        trajectory = item.trajectory
        prompt = int(trajectory.prompt_ids.shape[0])
        response = trajectory.token_ids[: item.scored_tokens]
        inputs.append(np.concatenate([trajectory.prompt_ids, response]))
        offsets = np.flatnonzero(item.trained_mask)
        count = offsets.shape[0]
        parts.append(
            (
                np.full(count, row if attention is None else 0, np.int64),
                begin + prompt + offsets - 1,  # the logits at a position predict the next token
                response[offsets].astype(np.int64),
                trajectory.behavior_logprobs[offsets],
                np.full(count, item.advantage, np.float32),
                np.full(count, 1.0 / denominator, np.float32),
                batch.ages_of(trajectory.policy_versions[offsets]),
            )
        )
        begin += 0 if attention is None else inputs[-1].shape[0]
    joined = [torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True)]
    rows, columns, targets, behavior, advantages, inverse, ages = joined
    lengths = [one.shape[0] for one in inputs]
    recorded = [item.trajectory.routed_experts if routing else None for item, _ in entries]
    if attention is None:
        input_ids = pad_rows(inputs, pad_id)
        experts = pad_routing(recorded, input_ids.shape[1])
    else:
        input_ids = torch.from_numpy(np.concatenate(inputs).astype(np.int64))[None]
        experts = pad_routing(recorded, max(lengths))
        if experts is not None:
            rows_of = zip(experts, lengths, strict=True)
            experts = np.concatenate([one[:length] for one, length in rows_of])[None]
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
        None if attention is None else Packing.of(lengths, attention),
    )
