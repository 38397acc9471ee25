"""Build one batch: choose ready groups, reserve, decode, select, write down what was decided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import structlog

from learner.algorithms.advantages import group_advantages
from learner.algorithms.selection import select
from learner.record import BatchRecord, CarriedRollout, candidate, decode_rollout
from ringasync.broker.client import Broker
from ringasync.broker.types import Fence, RawGroup, ReadyGroup
from ringasync.config.schema import Config
from ringasync.errors import SchemaError
from ringasync.records.states import GroupState
from ringasync.records.trajectory import Trajectory
from ringasync.records.versions import staleness_steps
from ringasync.runtime import crashpoints

_MAX_READY_GROUPS = 4096
_SEED_STRIDE = 1_000_003


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """What the loop asks for. ``partial`` accepts a batch below Phi (rounds, end of the data)."""

    step: int
    carry: tuple[CarriedRollout, ...]
    policy_version: int
    incarnation: int
    round_id: int
    partial: bool


def carry_tokens(carry: Sequence[CarriedRollout]) -> int:
    """Policy tokens of the carried trajectories."""
    return sum(one.trajectory().num_policy_tokens for one in carry)


def oldest_first(ready: Sequence[ReadyGroup], missing_tokens: int) -> list[ReadyGroup]:
    """The shortest prefix of ``ready`` that holds ``missing_tokens``; all when they are too few."""
    chosen: list[ReadyGroup] = []
    for group in ready:
        if missing_tokens <= 0:
            break
        chosen.append(group)
        missing_tokens -= group.num_tokens
    return chosen


class Batcher:
    """Assembles batches from the broker's ready groups and the carry."""

    def __init__(self, broker: Broker, fence: Fence, config: Config) -> None:
        self._broker = broker
        self._fence = fence
        self._config = config
        self._attempt = 0
        schedule = config.schedule
        # In rounds retention decides how old a rollout may get: Algorithm 1 knows no other limit.
        self._max_staleness = schedule.max_staleness if schedule.mode == "pipelined" else None
        self._log = structlog.get_logger(__name__)
        self.ready_tokens = 0
        """Ready tokens, carry included, as last seen: for stall reports."""

    async def assemble(self, request: BatchRequest) -> BatchRecord | None:
        """Reserve groups and decide the batch; None when too little is ready.

        On return the groups are reserved under the record's batch id; the caller journals and
        commits. Stale groups have ended; groups that do not decode are quarantined with the reason,
        and if too little is left then, the reservation is given back.
        """
        budget = self._config.schedule.budget.tokens
        missing = budget - carry_tokens(request.carry)
        ready = await self._broker.ready_groups(_MAX_READY_GROUPS) if missing > 0 else []
        # After a rollback a carried trajectory's group may be ready again: it was taken before.
        carried = {one.group_id for one in request.carry}
        ready = [group for group in ready if group.group_id not in carried]
        chosen = oldest_first(ready, missing)
        self.ready_tokens = budget - missing + sum(group.num_tokens for group in ready)
        if self._too_few(request, missing, sum(group.num_tokens for group in chosen), len(chosen)):
            return None
        self._attempt += 1
        batch_id = f"b{request.step:08d}-f{self._fence.token}-{self._attempt}"
        raw, stale = await self._broker.reserve(
            self._fence,
            batch_id,
            [group.group_id for group in chosen],
            request.step,
            self._max_staleness,
        )
        crashpoints.reach("reserved", request.step)
        if stale:
            self._log.info("groups went stale", step=request.step, groups=stale)
        usable, decoded = await self._decode(raw)
        found = sum(one.num_policy_tokens for one in decoded)
        if self._too_few(request, missing, found, len(usable)):
            await self._broker.release(self._fence, batch_id)
            return None
        return await self._decide(batch_id, request, usable, decoded)

    @staticmethod
    def _too_few(request: BatchRequest, missing: int, found: int, groups: int) -> bool:
        if request.partial:
            return groups == 0 and not request.carry
        return found < missing

    async def _decode(
        self, raw: Sequence[RawGroup]
    ) -> tuple[tuple[RawGroup, ...], list[Trajectory]]:
        usable: list[RawGroup] = []
        decoded: list[Trajectory] = []
        for group in raw:
            try:
                decoded.extend(decode_group(group))
            except SchemaError as error:
                self._log.warning("group quarantined", group=group.group_id, why=str(error))
                await self._broker.end_group(
                    self._fence, group.group_id, GroupState.QUARANTINED, str(error)
                )
            else:
                usable.append(group)
        return tuple(usable), decoded

    async def _decide(
        self,
        batch_id: str,
        request: BatchRequest,
        groups: tuple[RawGroup, ...],
        decoded: Sequence[Trajectory],
    ) -> BatchRecord:
        carried = [one.trajectory() for one in request.carry]
        by_group: dict[str, list[Trajectory]] = {group.group_id: [] for group in groups}
        for one in decoded:
            by_group[one.group_id].append(one)
        advantages: dict[str, float] = {}
        for members in by_group.values():
            values = group_advantages(
                [one.reward for one in members],
                divide_by_std=self._config.loss.advantage_std,
            )
            for one, value in zip(members, values, strict=True):
                advantages[one.rollout_id] = float(value)
        seed = self._config.run.seed * _SEED_STRIDE + request.step
        budget = self._config.schedule.budget.tokens
        selection = select(
            [candidate(one) for one in carried],
            [[candidate(one) for one in members] for members in by_group.values()],
            budget_tokens=budget,
            seed=seed,
        )
        return BatchRecord(
            batch_id=batch_id,
            step=request.step,
            fence=self._fence.token,
            incarnation=request.incarnation,
            round_id=request.round_id,
            policy_version=request.policy_version,
            budget_tokens=budget,
            seed=seed,
            groups=groups,
            advantages=advantages,
            carried=request.carry,
            order=selection.order,
            surplus=selection.surplus,
            ages=await self._ages([*carried, *decoded], request.step),
        )

    async def _ages(self, trajectories: Sequence[Trajectory], step: int) -> dict[int, int]:
        """Ages of the versions in these trajectories; an unknown one counts as oldest."""
        steps = await self._broker.version_steps()
        versions = sorted({int(v) for one in trajectories for v in np.unique(one.policy_versions)})
        ages = {version: staleness_steps(version, steps, step) for version in versions}
        return {version: step if age is None else age for version, age in ages.items()}


def decode_group(group: RawGroup) -> list[Trajectory]:
    """Trajectories of a reserved group.

    Raises ``SchemaError`` when a payload is broken, a reward is not a finite number, the prompt is
    empty or unreadable, or the group has no rollouts.
    """
    if group.unreadable:
        raise SchemaError(f"group {group.group_id}: {group.unreadable}")
    if not group.prompt_ids:
        raise SchemaError(f"group {group.group_id} has an empty prompt")
    if not group.rollouts:
        raise SchemaError(f"group {group.group_id} has no rollouts")
    members = []
    for rollout in group.rollouts:
        if not -float("inf") < rollout.reward < float("inf"):
            raise SchemaError(f"rollout {rollout.rollout_id} has reward {rollout.reward}")
        try:
            members.append(decode_rollout(group.group_id, group.domain, group.prompt_ids, rollout))
        except SchemaError as error:
            raise SchemaError(f"rollout {rollout.rollout_id}: {error}") from error
    return members
