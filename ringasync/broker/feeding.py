"""What the coordinator does: feed, reap, rounds, purge, evaluation pin, outcomes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, cast

from ringasync.broker.core import Arg, BrokerCore, compact, fence_args, text
from ringasync.broker.types import Backlog, Fence, NewGroup, Outcome, TicketKind
from ringasync.records.states import GroupState

_ENDS = {
    GroupState.PURGED,
    GroupState.QUARANTINED,
    GroupState.STALE,
    GroupState.FILTERED,
    GroupState.GRADE_ERROR,
    GroupState.LOST,
    GroupState.EVALUATED,
}


class FeedingMixin(BrokerCore):
    """The coordinator's scripts; all but the reads carry its fencing token."""

    async def feed(
        self,
        fence: Fence,
        request_id: str,
        groups: Sequence[NewGroup],
        cursor: str,
        after: str | None = None,
    ) -> int:
        """Create groups with rollouts and tickets and move the data cursor, in one script.

        Returns how many groups this request fed: a repeat of ``request_id`` gives the first
        answer. Returns -1, with nothing changed and the cursor unmoved, when Redis is full, and -2
        when ``after`` is given and the stored cursor is another: Redis lost its tail since.
        Raises ``InvariantError`` when a group id was fed before.
        """
        args: list[Arg] = []
        for group in groups:
            args += [
                group.group_id,
                group.kind,
                group.domain,
                group.prompt.encode("utf-8", "replace"),
                compact(list(group.prompt_ids)),
                compact(group.task).encode("utf-8", "replace"),
                group.source_index,
                group.size,
                group.max_new_tokens,
                group.quarantine_reason.encode("utf-8", "replace"),
            ]
        if after is not None:
            args.append(after)
        reply = await self._script(
            "feed", *fence_args(fence), request_id, cursor, len(groups), *args
        )
        return int(reply)

    async def end_feeding(self, fence: Fence, cursor: str) -> bool:
        """Phase ``finishing``: all data are fed, up to ``cursor``. False, with nothing changed,
        when the stored cursor is another: Redis lost its tail since."""
        return bool(await self._script("end_feeding", *fence_args(fence), cursor))

    async def data_cursor(self) -> str:
        """The data position that the last feeding script stored; empty at first."""
        return text(await self._read(self._client.hget(self.keys.meta, "cursor")) or b"")

    async def reap(self, fence: Fence, max_attempts: int) -> dict[str, int]:
        """End dead sessions and return their work; counts by what became of it.

        leased becomes parked (with tokens) or queued, and attempts rise if nothing was appended
        under the lease; at ``max_attempts`` the group is quarantined. grading becomes finished.
        """
        reply = await self._script("reap", *fence_args(fence), max_attempts)
        return {name: int(count) for name, count in json.loads(reply).items()}

    async def backlog(self) -> Backlog:
        """Counts that scheduling looks at, read in one script; costs the same at any run size."""
        view = json.loads(await self._script("backlog"))
        self._saw_accepted(int(_map(view["ledger"]).get("accepted", 0)))
        return _backlog(view)

    # Rounds

    async def open_round(self, fence: Fence, request_id: str, round_id: int) -> None:
        """Open a round and reset its counters. The one before must be finished."""
        await self._script("open_round", *fence_args(fence), request_id, round_id)

    async def close_round(self, fence: Fence, request_id: str, round_id: int) -> int:
        """Close it: retention + 1 on every unfinished train rollout, once. Returns how many."""
        return int(await self._script("close_round", *fence_args(fence), request_id, round_id))

    async def round_to_training(self, fence: Fence, round_id: int) -> bool:
        """Hand the round to the learner; False while train leases are still out."""
        return bool(await self._script("round_to_training", *fence_args(fence), round_id))

    async def finish_round(self, fence: Fence, round_id: int) -> None:
        """Learner: the round is trained; the coordinator may open the next."""
        await self._script("finish_round", *fence_args(fence), round_id)

    async def purge(
        self,
        fence: Fence,
        request_id: str,
        sigma: int,
        action: Literal["drop_group", "replace"],
    ) -> list[str]:
        """Purge unfinished train rollouts with retention above ``sigma``.

        ``drop_group`` ends their groups and returns group ids; ``replace`` gives each group a
        fresh sibling and returns the ids of the rollouts that went; each has its outcome.
        """
        reply = await self._script("purge", *fence_args(fence), request_id, sigma, action)
        return [part for part in text(reply).split(",") if part]

    async def end_group(
        self, fence: Fence, group_id: str, state: GroupState | str, reason: str
    ) -> bool:
        """End an open, ready or reserved group by hand; False if it had ended before."""
        ending = GroupState(state)
        if ending not in _ENDS:
            raise ValueError(f"a group cannot be ended as {ending.value}")
        reply = await self._script("end_group", *fence_args(fence), group_id, ending.value, reason)
        return bool(reply)

    async def set_pin(self, fence: Fence, on: bool) -> int | None:
        """Pin the latest version for an evaluation, or clear the pin.

        Returns the pinned version; None when cleared or when nothing is published. A pin that is
        set stays what it is.
        """
        return int(await self._script("set_pin", *fence_args(fence), "1" if on else "0")) or None

    # Outcomes

    async def read_outcomes(self, after_id: str, count: int) -> list[Outcome]:
        """How groups ended, after ``after_id`` ("0" from the beginning), oldest first.

        A group may come twice: ``ready`` first, then ``stale`` or ``quarantined``. An entry with
        ``rollout_id`` is of one purged rollout whose group goes on.
        """
        first = "-" if after_id in ("", "0", "-") else f"({after_id}"
        rows = await self._read(self._client.xrange(self.keys.outcomes, first, "+", count))
        return [_outcome(text(entry_id), fields) for entry_id, fields in rows]

    async def trim_outcomes(self, fence: Fence, before_id: str) -> None:
        """Drop outcomes older than ``before_id``."""
        await self._script("trim_stream", *fence_args(fence), "outcomes", before_id)


def _map(value: Any) -> dict[str, int]:
    return value if isinstance(value, dict) else {}  # an empty Lua table comes as a list


def _backlog(view: dict[str, Any]) -> Backlog:
    pool, counted = _map(view["pool"]), _map(view["round"])

    def rollouts(kind: str, *states: str) -> int:
        return sum(pool.get(f"rollouts:{kind}:{state}", 0) for state in states)

    def tokens(*accounts: str) -> int:
        return sum(pool.get(f"tokens:train:{account}", 0) for account in accounts)

    unfinished = rollouts("train", "queued", "parked", "leased")
    return Backlog(
        open_groups=pool.get("groups:train:open", 0),
        open_rollouts=unfinished,
        running_rollouts=rollouts("train", "leased"),
        ready_groups=pool.get("groups:train:ready", 0),
        ready_tokens=pool.get("ready_tokens", 0),
        admitted_tokens_known=tokens("finished", "graded", "taken"),
        admitted_rollouts_unfinished=unfinished,
        reserved_tokens=pool.get("reserved_tokens", 0),
        taken_tokens=tokens("taken"),
        finished_tokens_round=counted.get("finished", 0),
        generated_tokens_round=counted.get("generated", 0),
        trainable_tokens_round=counted.get("trainable", 0),
        eval_open=pool.get("groups:eval:open", 0),
        queued_tickets=int(view["tickets"]),
        grading_jobs=rollouts("train", "finished", "grading")
        + rollouts("eval", "finished", "grading"),
        paused_feeding=str(view["paused_feeding"]),
    )


def _outcome(entry_id: str, fields: dict[bytes, bytes]) -> Outcome:
    row = {text(name): text(value) for name, value in fields.items()}
    return Outcome(
        entry_id=entry_id,
        group_id=row["group"],
        kind=cast(TicketKind, row["kind"]),
        domain=row["domain"],
        end=row["end"],
        rewards=tuple(float(part) for part in row["rewards"].split(",") if part),
        lengths=tuple(int(part) for part in row["lengths"].split(",") if part),
        versions=tuple(int(part) for part in row["versions"].split("-") if part),
        retention=int(row["retention"]),
        reason=row["reason"],
        at_ms=int(row["at_ms"]),
        rollout_id=row.get("rollout", ""),
    )
