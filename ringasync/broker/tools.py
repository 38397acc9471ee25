"""What people look at: the audit, the ledger, single records, samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ringasync.broker.core import BrokerCore, pairs, text
from ringasync.broker.types import AuditReport, GroupView, RolloutView
from ringasync.records.states import LIVE_ACCOUNTS, Account


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

    async def live_groups(self) -> list[str]:
        """Ids of all groups that are neither trained nor ended otherwise, in no order."""
        return [text(raw) for raw in await self._read(self._client.smembers(self.keys.live))]

    async def group_states(self, group_ids: Sequence[str]) -> list[GroupView]:
        """State of these groups and of each of their rollouts, unknown ones left out.

        Two round trips, however many they are.
        """
        found = [
            (group_id, fields)
            for group_id, raw in zip(
                group_ids,
                await self._many([self.keys.group(group_id) for group_id in group_ids]),
                strict=True,
            )
            if (fields := pairs(raw))
        ]
        ids = [
            f"{group_id}.{index}"
            for group_id, fields in found
            for index in fields.get("members", "").split(",")
            if index
        ]
        rollouts: dict[str, list[RolloutView]] = {}
        replies = await self._many([self.keys.rollout(rollout_id) for rollout_id in ids])
        for rollout_id, raw in zip(ids, replies, strict=True):
            row = pairs(raw)
            view = RolloutView(rollout_id, row.get("state", "gone"), int(row.get("tokens") or 0))
            rollouts.setdefault(rollout_id.rpartition(".")[0], []).append(view)
        return [
            GroupView(
                group_id,
                fields.get("state", ""),
                fields.get("domain", ""),
                tuple(rollouts.get(group_id, ())),
            )
            for group_id, fields in found
        ]

    async def _many(self, keys: Sequence[str]) -> list[Any]:
        """HGETALL of each key, in one round trip."""
        if not keys:
            return []
        async with self._client.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.hgetall(key)
            replies: list[Any] = await self._read(pipe.execute())
        return replies

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
