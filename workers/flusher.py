"""Sends buffered tokens to the broker and lets go of rollouts that are done. Knows no engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from ringasync.broker.client import Broker
from ringasync.broker.types import AppendStatus, MoveStatus
from ringasync.errors import InvariantError, SchemaError
from ringasync.observability.log import get_logger
from ringasync.runtime import crashpoints
from workers.buffers import LocalRollout, RolloutStore

BATCH_ROLLOUTS = 64
"""Rollouts in one broker call: larger ones hold Redis up, smaller ones cost a round trip each."""

_FULL_BACKOFF_S = (0.05, 1.0)
T = TypeVar("T")

log = get_logger()


class Flusher:
    """Consumes: the store's tokens. Produces: appends, finishes and parks.

    ``on_lost`` is told of rollouts that this worker has no right to any more (their lease went to
    others, their group ended, or Redis lost their tail), so that the engine drops them.
    ``full_since_s`` is set while Redis refuses appends for lack of memory: tokens are kept and
    tried again, and nothing new should be taken.
    """

    def __init__(
        self,
        broker: Broker,
        store: RolloutStore,
        session_id: Callable[[], str],
        *,
        flush_tokens: int,
        flush_ms: int,
        on_lost: Callable[[Sequence[str]], None],
        on_progress: Callable[[], None],
    ) -> None:
        self._broker = broker
        self._store = store
        self._session_id = session_id
        self._flush_tokens = flush_tokens
        self._flush_s = flush_ms / 1000
        self._on_lost = on_lost
        self._on_progress = on_progress
        self._lock = asyncio.Lock()
        self._due = asyncio.Event()
        self._backoff_s = _FULL_BACKOFF_S[0]
        self.full_since_s: float | None = None
        self.appended_tokens = 0
        self.finished = 0
        self.parked = 0

    def wake(self) -> None:
        """Something is to be sent before the next tick."""
        self._due.set()

    async def run(self) -> None:
        """Flush what is due, for ever.

        Waits for: ``wake``, or a quarter of ``flush_ms``; after a full Redis a backoff. Unblocked
        by the clock at the latest. Ended by: its owner, or an unreachable broker.
        """
        while True:
            pause_s = self._flush_s / 4 if self.full_since_s is None else self._backoff_s
            try:
                async with asyncio.timeout(pause_s):
                    await self._due.wait()
            except TimeoutError:
                pass
            if self.full_since_s is not None:
                await asyncio.sleep(self._backoff_s)
            self._due.clear()
            await self.flush()

    async def flush(self, *, everything: bool = False) -> None:
        """Send what is due (or all that may be sent) until nothing is left or Redis is full."""
        limits = (1, 0.0) if everything else (self._flush_tokens, self._flush_s)
        async with self._lock:
            while due := self._store.due(*limits):
                for batch in _batches(due, BATCH_ROLLOUTS):
                    await self._append(batch)
                    # Also when Redis is full: what ends or is parked frees memory.
                    await self._settle(batch)
                self._on_progress()
                if self.full_since_s is not None:
                    return

    async def _append(self, rollouts: Sequence[LocalRollout]) -> None:
        items, owners = [], []
        for rollout in rollouts:
            try:
                item = rollout.cut(self._store.held_version)
            except SchemaError as error:
                await self._quarantine(rollout, str(error))
                continue
            if item is not None:
                items.append(item)
                owners.append(rollout)
        if not items:
            return
        statuses = await self._broker.append_many(self._session_id(), items)
        crashpoints.reach("appended")
        now_s = time.monotonic()
        for rollout, item, status in zip(owners, items, statuses, strict=True):
            if status in ("ok", "duplicate"):
                rollout.acknowledge(now_s)
                self.appended_tokens += item.num_tokens
            elif status != "full":
                await self._lose(rollout, status)
        self._note_full("full" in statuses)

    async def _lose(self, rollout: LocalRollout, status: AppendStatus | MoveStatus) -> None:
        """The rollout is not ours any more, or Redis knows less of it than we do."""
        if not self._store.holds(rollout):
            return  # superseded while the answer was on its way: a newer lease of it is held
        log.warning(
            "rollout given up",
            rollout=rollout.rollout_id,
            status=status,
            dropped_tokens=rollout.unsent_tokens,
        )
        self._store.remove(rollout.rollout_id)
        self._on_lost([rollout.rollout_id])
        if status == "gap":
            # Redis lost its tail: let somebody go on from what it still has.
            why = f"resync: Redis holds less than the {rollout.length} tokens it had accepted"
            await self._broker.park_many(
                self._session_id(), [(rollout.rollout_id, rollout.lease.token, why)]
            )

    async def _quarantine(self, rollout: LocalRollout, reason: str) -> None:
        log.error("rollout quarantined", rollout=rollout.rollout_id, reason=reason)
        self._store.remove(rollout.rollout_id)
        self._on_lost([rollout.rollout_id])
        await self._broker.quarantine_many(
            self._session_id(), [(rollout.rollout_id, rollout.lease.token, reason)]
        )

    async def _settle(self, rollouts: Sequence[LocalRollout]) -> None:
        """Finish or park those of which Redis has every token."""
        settled = [r for r in rollouts if r.is_settled and self._store.holds(r)]
        finished = [r for r in settled if r.finish is not None]
        parked = [r for r in settled if r.finish is None]
        if finished:
            await self._settle_finished(finished)
        if parked:
            statuses = await self._broker.park_many(
                self._session_id(), [(r.rollout_id, r.lease.token, r.leaving) for r in parked]
            )
            self.parked += await self._let_go(parked, statuses)

    async def _settle_finished(self, rollouts: Sequence[LocalRollout]) -> None:
        try:
            statuses = await self._finish(rollouts)
        except InvariantError:
            # One of them is shorter in Redis, which lost its tail; the others have moved.
            for rollout in rollouts:
                try:
                    self.finished += await self._let_go([rollout], await self._finish([rollout]))
                except InvariantError:
                    await self._lose(rollout, "gap")
            return
        self.finished += await self._let_go(rollouts, statuses)

    async def _finish(self, rollouts: Sequence[LocalRollout]) -> list[MoveStatus]:
        statuses = await self._broker.finish_many(
            self._session_id(),
            [(r.rollout_id, r.lease.token, str(r.finish), r.length) for r in rollouts],
        )
        crashpoints.reach("finished")
        return statuses

    async def _let_go(
        self, rollouts: Sequence[LocalRollout], statuses: Sequence[MoveStatus]
    ) -> int:
        """Forget what moved; returns how many did."""
        moved = 0
        for rollout, status in zip(rollouts, statuses, strict=True):
            if status in ("ok", "duplicate"):
                moved += 1
                if self._store.holds(rollout):
                    self._store.remove(rollout.rollout_id)
            elif status != "full":
                await self._lose(rollout, status)
        return moved

    def _note_full(self, full: bool) -> None:
        now_s = time.monotonic()
        if not full:
            if self.full_since_s is not None:
                log.info("redis takes tokens again", after_s=round(now_s - self.full_since_s, 1))
            self.full_since_s, self._backoff_s = None, _FULL_BACKOFF_S[0]
        elif self.full_since_s is None:
            self.full_since_s = now_s
            log.warning("redis is full: keeping tokens, taking no new work")
        else:
            self._backoff_s = min(2 * self._backoff_s, _FULL_BACKOFF_S[1])


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
