"""What the journal keeps of one batch: everything needed to train it again without Redis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgpack
import numpy as np

from learner.algorithms.selection import Candidate, Selected
from learner.batch import BatchItem, TrainBatch
from ringasync import SCHEMA_VERSION
from ringasync.broker.types import RawGroup, RawRollout, TrainedTokens
from ringasync.errors import MALFORMED, JournalError, SchemaError
from ringasync.records.routing import RoutedRows, last_rows
from ringasync.records.segment import decode_segment
from ringasync.records.trajectory import FlatResponse, Trajectory, join_segments

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class CarriedRollout:
    """A surplus trajectory on its way to a later batch: whole, with its advantage frozen."""

    group_id: str
    domain: str
    prompt_ids: tuple[int, ...]
    source_index: int
    rollout: RawRollout
    advantage: float

    def trajectory(self) -> Trajectory:
        """Decode. Raises ``SchemaError`` when the payload is broken."""
        return decode_rollout(self.group_id, self.domain, self.prompt_ids, self.rollout)


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """One batch as journalled, self-contained: new groups and carried trajectories in full.

    ``step`` is the number of batches before this one; ``order`` is the training order with trained
    and masked token counts; ``surplus`` the rollouts carried on, in order; ``ages`` maps the
    batch's policy versions to their age in learner steps. ``round_id`` is 0 when pipelined.
    """

    batch_id: str
    step: int
    fence: int
    incarnation: int
    round_id: int
    policy_version: int
    budget_tokens: int
    seed: int
    groups: tuple[RawGroup, ...]
    advantages: Mapping[str, float]
    carried: tuple[CarriedRollout, ...]
    order: tuple[Selected, ...]
    surplus: tuple[str, ...]
    ages: Mapping[int, int]

    @property
    def trajectories_per_group(self) -> dict[str, int]:
        """New groups and how many trajectories each has: what ``commit`` is told."""
        return {group.group_id: len(group.rollouts) for group in self.groups}

    def credited(self) -> dict[str, CarriedRollout]:
        """Every rollout that the batch could have trained, by id, carried ones first."""
        result = {one.rollout.rollout_id: one for one in self.carried}
        for group in self.groups:
            for rollout in group.rollouts:
                result[rollout.rollout_id] = CarriedRollout(
                    group.group_id,
                    group.domain,
                    group.prompt_ids,
                    group.source_index,
                    rollout,
                    self.advantages[rollout.rollout_id],
                )
        return result

    def carry(self) -> tuple[CarriedRollout, ...]:
        """What the next batch begins with."""
        credited = self.credited()
        return tuple(credited[rollout_id] for rollout_id in self.surplus)

    def train_batch(self) -> TrainBatch:
        """The batch to train: a function of this record alone."""
        credited = self.credited()
        items = []
        for selected in self.order:
            one = credited[selected.rollout_id]
            items.append(BatchItem(one.trajectory(), one.advantage, selected.trained_tokens))
        return TrainBatch(
            self.batch_id, self.step, self.budget_tokens, tuple(items), dict(self.ages)
        )

    def trained_tokens(self) -> list[TrainedTokens]:
        """What ``mark_trained`` is told: one entry a group that this batch touched."""
        open_of: dict[str, int] = {}
        credited = self.credited()
        for rollout_id in self.surplus:
            group_id = credited[rollout_id].group_id
            open_of[group_id] = open_of.get(group_id, 0) + 1
        trained: dict[str, list[int]] = {}
        for one in self.order:
            entry = trained.setdefault(one.group_id, [0, 0])
            entry[0] += one.trained_tokens
            entry[1] += one.masked_tokens
        return [
            TrainedTokens(group_id, tokens, masked, open_of.get(group_id, 0))
            for group_id, (tokens, masked) in trained.items()
        ]


def decode_rollout(
    group_id: str, domain: str, prompt_ids: Sequence[int], rollout: RawRollout
) -> Trajectory:
    """Join a raw rollout's segments. Raises ``SchemaError`` on a broken segment or order."""
    flat = join_segments([decode_segment(payload) for payload in rollout.segments])
    return Trajectory(
        rollout_id=rollout.rollout_id,
        group_id=group_id,
        domain=domain,
        prompt_ids=np.asarray(prompt_ids, dtype=np.int32),
        token_ids=flat.token_ids,
        behavior_logprobs=flat.behavior_logprobs,
        policy_versions=flat.policy_versions,
        loss_mask=flat.loss_mask,
        reward=rollout.reward,
        finish_reason=rollout.finish_reason,
        retention=rollout.retention,
        routed_experts=_rows_by_position(flat, len(prompt_ids)),
    )


def _rows_by_position(flat: FlatResponse, prompt_tokens: int) -> RoutedRows | None:
    rows = flat.routed_experts
    if rows is None:
        return None
    wanted = prompt_tokens - 1 + flat.token_ids.shape[0]
    if rows.shape[0] > wanted:
        raise SchemaError(
            f"rollout has {rows.shape[0]} rows of routed experts, but {wanted} positions were read"
        )
    return last_rows(rows, wanted)


def candidate(trajectory: Trajectory) -> Candidate:
    """What the selection needs to know of a trajectory."""
    return Candidate(trajectory.rollout_id, trajectory.group_id, trajectory.num_policy_tokens)


def pack_record(record: BatchRecord) -> dict[str, Any]:
    """The record as plain msgpack data."""
    return {
        "schema": SCHEMA_VERSION,
        "batch_id": record.batch_id,
        "step": record.step,
        "fence": record.fence,
        "incarnation": record.incarnation,
        "round_id": record.round_id,
        "policy_version": record.policy_version,
        "budget_tokens": record.budget_tokens,
        "seed": record.seed,
        "groups": [_pack_group(group) for group in record.groups],
        "advantages": dict(record.advantages),
        "carried": [pack_carried(one) for one in record.carried],
        "order": [
            [s.rollout_id, s.group_id, s.trained_tokens, s.masked_tokens] for s in record.order
        ],
        "surplus": list(record.surplus),
        "ages": [[version, age] for version, age in record.ages.items()],
    }


def unpack_record(fields: Any) -> BatchRecord:
    """Rebuild ``pack_record``'s data. Raises ``JournalError`` on a missing or wrong field."""
    _check_schema(fields)
    try:
        record = BatchRecord(
            batch_id=str(fields["batch_id"]),
            step=int(fields["step"]),
            fence=int(fields["fence"]),
            incarnation=int(fields["incarnation"]),
            round_id=int(fields["round_id"]),
            policy_version=int(fields["policy_version"]),
            budget_tokens=int(fields["budget_tokens"]),
            seed=int(fields["seed"]),
            groups=tuple(_unpack_group(one) for one in fields["groups"]),
            advantages={str(k): float(v) for k, v in fields["advantages"].items()},
            carried=tuple(unpack_carried(one) for one in fields["carried"]),
            order=tuple(
                Selected(_is(r, str), _is(g, str), int(t), int(m)) for r, g, t, m in fields["order"]
            ),
            surplus=tuple(_is(one, str) for one in fields["surplus"]),
            ages={int(version): int(age) for version, age in fields["ages"]},
        )
        known = record.credited()
        missing = {*(one.rollout_id for one in record.order), *record.surplus} - known.keys()
        if missing:
            raise ValueError(f"it names rollouts that it does not hold: {sorted(missing)[:3]}")
    except MALFORMED as error:
        raise JournalError(
            f"journal record misses a field or has a wrong one: {error!r}"
        ) from error
    return record


def pack_carried(one: CarriedRollout) -> list[Any]:
    """A carried trajectory as plain msgpack data."""
    return [
        one.group_id,
        one.domain,
        list(one.prompt_ids),
        one.source_index,
        _pack_rollout(one.rollout),
        one.advantage,
    ]


def unpack_carried(fields: Any) -> CarriedRollout:
    """Rebuild ``pack_carried``'s data."""
    group_id, domain, prompt_ids, source_index, rollout, advantage = fields
    return CarriedRollout(
        _is(group_id, str),
        _is(domain, str),
        _unpack_prompt(prompt_ids),
        _is(source_index, int),
        _unpack_rollout(rollout),
        _is(advantage, float),
    )


def pack_carry(carry: Iterable[CarriedRollout]) -> bytes:
    """The carry as bytes for a checkpoint."""
    fields = {"schema": SCHEMA_VERSION, "carry": [pack_carried(one) for one in carry]}
    return bytes(msgpack.packb(fields))


def unpack_carry(payload: bytes) -> tuple[CarriedRollout, ...]:
    """Rebuild ``pack_carry``'s data. Raises ``JournalError`` when it is not whole."""
    try:
        fields = msgpack.unpackb(payload)
        _check_schema(fields)
        return tuple(unpack_carried(one) for one in fields["carry"])
    except (*MALFORMED, msgpack.UnpackException) as error:
        raise JournalError(f"carried trajectories are unreadable: {error!r}") from error


def _pack_group(group: RawGroup) -> list[Any]:
    return [
        group.group_id,
        group.domain,
        list(group.prompt_ids),
        group.source_index,
        [_pack_rollout(rollout) for rollout in group.rollouts],
    ]


def _unpack_group(fields: Any) -> RawGroup:
    group_id, domain, prompt_ids, source_index, rollouts = fields
    return RawGroup(
        _is(group_id, str),
        _is(domain, str),
        _unpack_prompt(prompt_ids),
        _is(source_index, int),
        tuple(_unpack_rollout(rollout) for rollout in rollouts),
    )


def _pack_rollout(rollout: RawRollout) -> list[Any]:
    return [
        rollout.rollout_id,
        rollout.reward,
        rollout.finish_reason,
        rollout.retention,
        list(rollout.segments),
    ]


def _unpack_rollout(fields: Any) -> RawRollout:
    rollout_id, reward, finish_reason, retention, segments = fields
    return RawRollout(
        _is(rollout_id, str),
        float(reward),
        _is(finish_reason, str),
        _is(retention, int),
        tuple(_is(one, bytes) for one in segments),
    )


def _unpack_prompt(token_ids: Any) -> tuple[int, ...]:
    prompt = tuple(_is(token, int) for token in token_ids)
    if prompt and not 0 <= min(prompt) <= max(prompt) < 2**31:
        raise ValueError("a prompt holds a token id that is no int32 above -1")
    return prompt


def _is(value: Any, kind: type[_T]) -> _T:
    if type(value) is not kind:
        raise TypeError(f"{value!r:.40} is no {kind.__name__}")
    return value


def _check_schema(fields: Any) -> None:
    found = fields.get("schema") if isinstance(fields, dict) else type(fields).__name__
    if found != SCHEMA_VERSION:
        raise JournalError(
            f"journal record has schema {found!r}, this build reads {SCHEMA_VERSION}"
        )
