"""What workers and graders do: take, append, finish, park, quarantine, grade."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, cast

import msgpack

from ringasync.broker.core import Arg, BrokerCore, new_nonce, read_or_why, text
from ringasync.broker.types import (
    AppendItem,
    AppendStatus,
    GradeJob,
    Lease,
    MoveStatus,
    TicketKind,
    Verdict,
)
from ringasync.errors import InvariantError
from ringasync.records.prompt import read_prompt_ids, read_task

_SAMPLE_CHARS = 8192


class WorkingMixin(BrokerCore):
    """A session's scripts. Each item is fenced by its lease token; a repeat says ``duplicate``."""

    async def take(self, session_id: str, n: int, loaded_version: int) -> list[Lease]:
        """Lease up to ``n`` rollouts: evaluation first, then resumable, then fresh ones.

        Evaluation rollouts are given only if the pinned version is the loaded one; a rollout that
        holds tokens of a newer version than the loaded one is left to other workers. Nothing is
        given while the run is paused or done, nor train rollouts while their round is not open.
        Raises ``SessionLostError`` when the session has ended.
        """
        if n <= 0:
            return []
        rows = await self._script("take", session_id, n, loaded_version, new_nonce())
        seed = await self._run_seed() if rows else ""
        return [_lease(row, seed) for row in rows]

    async def _run_seed(self) -> str:
        if not self._seed:
            self._seed = text(await self._read(self._client.hget(self.keys.meta, "seed")) or b"0")
        return self._seed

    async def append_many(self, session_id: str, items: Sequence[AppendItem]) -> list[AppendStatus]:
        """Append segments of many rollouts in one script; statuses in the same order.

        ``full`` means that Redis is at its memory limit and nothing of this call was appended.
        ``gap`` also stands for a policy version that falls inside a rollout.
        """
        if not items:
            return []
        heads: list[Any] = []
        for item in items:
            start, length = item.start, item.length
            heads += (
                item.rollout_id,
                item.token,
                str(start),
                str(start + length),
                length,
                item.num_tokens,
                item.policy_version,
            )
        # Small fields in one argument: each argument costs client and server more than its bytes.
        payloads = [item.payload for item in items]
        reply = await self._script("append_many", msgpack.packb(heads), *payloads)
        if not reply:
            return ["ok"] * len(items)
        return [cast(AppendStatus, text(status)) for status in reply]

    async def finish_many(
        self, session_id: str, items: Sequence[tuple[str, str, str, int]]
    ) -> list[MoveStatus]:
        """``(rollout_id, lease_token, finish_reason, total_length)``: leased -> finished.

        Raises ``InvariantError`` for a rollout whose stored length differs (the others still move).
        """
        if not items:
            return []
        args: list[Arg] = [part for item in items for part in item]
        statuses = [text(s) for s in await self._script("finish_many", session_id, *args)]
        for item, status in zip(items, statuses, strict=True):
            if status.startswith("length "):
                raise InvariantError(
                    f"finish of {item[0]}: worker says {item[3]} tokens, the record holds "
                    f"{status[7:]}: append before finishing"
                )
        return [cast(MoveStatus, status) for status in statuses]

    async def park_many(
        self, session_id: str, items: Sequence[tuple[str, str, str]]
    ) -> list[MoveStatus]:
        """``(rollout_id, lease_token, why)``: leased -> parked; queued if nothing was appended.

        A ``why`` that begins with "error" counts as a lost lease: without progress attempts rise,
        and at the run's limit the group is quarantined.
        """
        return await self._moves("park_many", session_id, items)

    async def quarantine_many(
        self, session_id: str, items: Sequence[tuple[str, str, str]]
    ) -> list[MoveStatus]:
        """``(rollout_id, lease_or_grading_token, reason)``: the whole group ends as quarantined."""
        return await self._moves("quarantine_many", session_id, items)

    async def _moves(
        self, script: str, session_id: str, items: Sequence[tuple[str, str, str]]
    ) -> list[MoveStatus]:
        if not items:
            return []
        args: list[Arg] = [part for item in items for part in item]
        reply = await self._script(script, session_id, *args)
        return [cast(MoveStatus, text(status)) for status in reply]

    async def report_bad_version(self, session_id: str, version: int, why: str) -> int:
        """A version failed checksum, read-back or canary here; returns how many workers say so.

        From two distinct workers on, the version is in ``Poll.bad_versions`` and publication is
        blocked until ``set_paused(False)`` (`ringasync resume`) or ``unblock_publication``.
        """
        return int(await self._script("bad_version", session_id, version, why))

    # Grading

    async def take_grading(self, session_id: str, n: int) -> list[GradeJob]:
        """Take up to ``n`` finished rollouts for grading. ``SessionLostError`` as in ``take``."""
        if n <= 0:
            return []
        rows = await self._script("take_grading", session_id, n, new_nonce())
        return [_job(row) for row in rows]

    async def grade_many(
        self,
        session_id: str,
        verdicts: Sequence[Verdict],
        max_attempts: int,
        filter_zero_variance: bool,
        samples_keep: int,
    ) -> list[MoveStatus]:
        """Store verdicts. The last sibling makes its group ready, filtered or evaluated.

        An error (or a reward that is not finite) is retried, at ``max_attempts`` the group ends
        as ``grade_error``. A group is flat when its rewards are equal exactly.
        """
        if not verdicts:
            return []
        args: list[Arg] = []
        for verdict in verdicts:
            reward, error = _judged(verdict)
            args += [verdict.rollout_id, verdict.token, reward, error]
            args.append(verdict.text[:_SAMPLE_CHARS].encode("utf-8", "replace"))
        reply = await self._script(
            "grade_many",
            session_id,
            max_attempts,
            "1" if filter_zero_variance else "0",
            samples_keep,
            *args,
        )
        return [cast(MoveStatus, text(status)) for status in reply]


def _judged(verdict: Verdict) -> tuple[str, str]:
    if verdict.error or verdict.reward is None:
        return "", verdict.error or "the verifier gave neither reward nor error"
    if not math.isfinite(verdict.reward):
        return "", f"the verifier gave the reward {verdict.reward}"
    return repr(float(verdict.reward) + 0.0), ""  # + 0.0: -0.0 and 0.0 are the same reward


def _lease(row: list[Any], run_seed: str) -> Lease:
    rollout_id, token = text(row[0]), text(row[2])
    pin = text(row[10])
    kind = cast(TicketKind, text(row[3]))
    prompt_ids, unreadable = read_or_why(read_prompt_ids, row[4])
    return Lease(
        rollout_id=rollout_id,
        group_id=text(row[1]),
        token=token,
        kind=kind,
        prompt_ids=prompt_ids or (),
        segments=tuple(row[6]),
        num_tokens=int(row[7]),
        max_new_tokens=int(row[5]),
        seed=_seed(run_seed, rollout_id, int(row[7]), int(row[9])),
        retention=int(row[8]),
        attempts=int(row[9]),
        pin_version=int(pin) if kind == "eval" and pin else None,
        unreadable=unreadable,
    )


def _seed(run_seed: str, rollout_id: str, position: int, attempts: int) -> int:
    """31 bits: the same for the same place in the same run, fresh after a lost attempt."""
    name = f"{run_seed}/{rollout_id}/{position}/{attempts}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "little") & 0x7FFFFFFF


def _job(row: list[Any]) -> GradeJob:
    task, unreadable = read_or_why(read_task, row[6])
    return GradeJob(
        rollout_id=text(row[0]),
        group_id=text(row[1]),
        token=text(row[2]),
        kind=cast(TicketKind, text(row[3])),
        domain=text(row[4]),
        prompt=text(row[5]),
        task=task or {},
        segments=tuple(row[7]),
        finish_reason=text(row[8]),
        attempts=int(row[9]),
        unreadable=unreadable,
    )
