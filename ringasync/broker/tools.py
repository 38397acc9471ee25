"""What people look at: the audit, the ledger, single records, samples."""

from __future__ import annotations

import json
from typing import Any

from ringasync.broker.core import BrokerCore
from ringasync.broker.types import AuditReport
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
