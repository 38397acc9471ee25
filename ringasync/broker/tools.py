"""What people look at: the audit, the ledger, single records, samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from ringasync.broker.core import BrokerCore, pairs, text
from ringasync.broker.types import AuditReport, GroupView, RolloutLife, RolloutView
from ringasync.records.states import LIVE_ACCOUNTS, Account

_PROGRESS_FIELDS = ("state", "worker", "length", "attempts", "grade_attempts")


class ToolsMixin(BrokerCore):
    """Reads for ``audit``, ``inspect``, ``samples`` and ``top``."""

    async def audit(self) -> AuditReport:
        """Recompute the live accounts from the records and compare them with the counters.

        One script: balanced at any moment, whatever is being killed. Balanced means that every
        account agrees, that all accounts add up to what was accepted, and that no link is broken.
        """
        view = json.loads(await self._script("audit"))
        counters = _accounts(view["counters"])
        accepted = _counts(view["counters"]).get("accepted", 0)
        self._saw_accepted(accepted)
        recomputed = _counts(view["recomputed"])
        differences = {
            account.value: recomputed.get(account.value, 0) - counters[account.value]
            for account in LIVE_ACCOUNTS
            if recomputed.get(account.value, 0) != counters[account.value]
        }
        total = sum(counters.values())
        if total != accepted:
            differences["accepted"] = total - accepted
        problems = tuple(view["problems"]) if isinstance(view["problems"], list) else ()
        return AuditReport(
            balanced=not differences and not problems,
            accepted_tokens=accepted,
            counters=counters,
            recomputed={**counters, **recomputed},
            differences=differences,
            problems=problems,
        )

    async def ledger(self) -> dict[str, int]:
        """Every account's counter, zeros included, and ``accepted``."""
        found = {k: int(v) for k, v in (await self._hash(self.keys.ledger)).items()}
        self._saw_accepted(found.get("accepted", 0))
        return {**_accounts(found), "accepted": found.get("accepted", 0)}

    async def rollout(self, rollout_id: str) -> dict[str, str] | None:
        """A rollout's fields, and ``progress``: tokens since its last lease.

        None when unknown (or gone for an hour).
        """
        fields = await self._hash(self.keys.rollout(rollout_id))
        if not fields:
            return None
        tokens, leased = (int(fields.get(name) or 0) for name in ("tokens", "leased_tokens"))
        return {**fields, "progress": str(tokens - leased)}

    async def history(self, rollout_id: str) -> list[dict[str, Any]]:
        """A rollout's transitions, oldest first: ``t_ms event worker version tokens why ...``."""
        rows = await self._read(self._client.lrange(self.keys.history(rollout_id), 0, -1))
        return [json.loads(row) for row in rows]

    async def group(self, group_id: str) -> dict[str, str] | None:
        """A group's fields; None when unknown."""
        return await self._hash(self.keys.group(group_id)) or None

    async def open_groups(self, oldest: int) -> dict[str, dict[str, dict[str, str]]]:
        """Of the ``oldest`` live training groups, those still open: group -> rollout -> fields.

        Fields: ``state``, ``worker``, ``length``, ``attempts``, ``grade_attempts``.
        """
        ids = sorted(await self.live_groups())[:oldest]
        found = await self._with_members(
            ids,
            ("state", "kind"),
            _PROGRESS_FIELDS,
            lambda group: (group["state"], group["kind"]) == ("open", "train"),
        )
        return {group_id: rollouts for group_id, (_, rollouts) in found.items() if rollouts}

    async def live_groups(self) -> list[str]:
        """Ids of all groups that are neither trained nor ended otherwise, in no order."""
        return [text(raw) for raw in await self._read(self._client.smembers(self.keys.live))]

    async def group_states(self, group_ids: Sequence[str]) -> list[GroupView]:
        """State of these groups and of each of their rollouts, unknown ones left out.

        Two round trips, however many they are.
        """
        found = await self._with_members(
            group_ids, ("state", "domain"), ("state", "tokens"), lambda group: bool(group["state"])
        )
        return [
            GroupView(
                group_id,
                group["state"],
                group["domain"],
                tuple(
                    RolloutView(rollout_id, row["state"] or "gone", int(row["tokens"] or 0))
                    for rollout_id, row in rollouts.items()
                ),
            )
            for group_id, (group, rollouts) in found.items()
        ]

    async def ended_groups(self) -> list[str]:
        """Ids of the last groups that ended, however they did, oldest first; 1024 at most."""
        return [text(raw) for raw in await self._read(self._client.lrange(self.keys.ended, 0, -1))]

    async def lives(self, group_id: str) -> tuple[dict[str, str], list[RolloutLife]]:
        """A group's fields and the lives of all its rollouts, replaced ones included.

        Two round trips; empty when the group is unknown.
        """
        group = await self._hash(self.keys.group(group_id))
        ids = [f"{group_id}.{index}" for index in range(int(group.get("next_index") or 0))]
        if not ids:
            return group, []
        async with self._client.pipeline(transaction=False) as pipe:
            for rollout_id in ids:
                pipe.hgetall(self.keys.rollout(rollout_id))
                pipe.lrange(self.keys.history(rollout_id), 0, -1)
            replies: list[Any] = await self._read(pipe.execute())
        return group, [
            RolloutLife(rollout_id, pairs(fields), tuple(json.loads(row) for row in rows))
            for rollout_id, fields, rows in zip(ids, replies[::2], replies[1::2], strict=True)
            if rows
        ]

    async def _with_members(
        self,
        group_ids: Sequence[str],
        group_fields: Sequence[str],
        rollout_fields: Sequence[str],
        wanted: Callable[[dict[str, str]], bool],
    ) -> dict[str, tuple[dict[str, str], dict[str, dict[str, str]]]]:
        """Group -> its fields, and rollout -> fields of its members, of those that are ``wanted``.

        Two round trips, however many they are; a field that is not there is empty.
        """
        asked = ("members", *group_fields)
        groups = await self._named([self.keys.group(one) for one in group_ids], asked)
        found = {one: group for one, group in zip(group_ids, groups, strict=True) if wanted(group)}
        ids = [
            (group_id, f"{group_id}.{index}")
            for group_id, group in found.items()
            for index in group["members"].split(",")
            if index
        ]
        rows = await self._named([self.keys.rollout(one) for _, one in ids], rollout_fields)
        members: dict[str, dict[str, dict[str, str]]] = {group_id: {} for group_id in found}
        for (group_id, rollout_id), row in zip(ids, rows, strict=True):
            members[group_id][rollout_id] = row
        return {group_id: (group, members[group_id]) for group_id, group in found.items()}

    async def _named(self, keys: Sequence[str], fields: Sequence[str]) -> list[dict[str, str]]:
        """HMGET of each key, in one round trip."""
        if not keys:
            return []
        async with self._client.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.hmget(key, *fields)
            replies = await self._read(pipe.execute())
        return [
            {name: text(value or b"") for name, value in zip(fields, values, strict=True)}
            for values in replies
        ]

    async def samples(self, n: int) -> list[dict[str, Any]]:
        """The newest graded responses as text, newest first."""
        if n <= 0:
            return []
        rows = await self._read(self._client.lrange(self.keys.samples, 0, n - 1))
        return [json.loads(row) for row in rows]


def _counts(value: Any) -> dict[str, int]:
    return value if isinstance(value, dict) else {}


def _accounts(value: Any) -> dict[str, int]:
    return {account.value: _counts(value).get(account.value, 0) for account in Account}
