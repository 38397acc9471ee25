"""Feeding: prompts become groups in Redis, together with the data cursor, in one script."""

from __future__ import annotations

import asyncio
import json
import re
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ringasync.broker.types import Backlog, NewGroup
from ringasync.coordinator.prompts import PromptCursor, PromptSource, group_id
from ringasync.coordinator.seat import Seat
from ringasync.errors import MALFORMED_JSON, CheckpointError, InvariantError
from ringasync.observability.log import get_logger
from ringasync.runtime import crashpoints
from ringasync.scheduling.watermark import DataPosition

GROUPS_A_CALL = 64
_FULL_PAUSE_S = 1.0
_LIVES_FILE = "feeding.json"
_CHECKPOINT = re.compile(r"^step(\d+)-f(\d+)-l(\d+)$")

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Cursor:
    """The data cursor that the feeding script stores: where to go on, and what to leave out.

    ``next_index`` is the next index to look at. ``closed`` is the data position this life of the
    broker started from; ``life`` counts how often Redis came back empty. ``ended`` is True once a
    finite mixture has been fed whole.
    """

    next_index: int = 0
    life: int = 0
    closed: DataPosition = field(default_factory=DataPosition)
    ended: bool = False

    @property
    def suffix(self) -> str:
        """Ending of group ids of this life; empty for the first."""
        return f"r{self.life}" if self.life else ""

    def to_json(self) -> str:
        """Stored in Redis with every feeding."""
        fields = {
            "next": self.next_index,
            "life": self.life,
            "closed": json.loads(self.closed.to_json()),
            "ended": self.ended,
        }
        return json.dumps(fields, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Cursor:
        """Read what ``to_json`` wrote. Raises ``CheckpointError`` on anything else."""
        try:
            data: Any = json.loads(text)
            closed = DataPosition.from_json(json.dumps(data["closed"]))
            return cls(int(data["next"]), int(data["life"]), closed, bool(data["ended"]))
        except MALFORMED_JSON as error:
            raise CheckpointError(f"not a data cursor: {text[:80]!r} ({error})") from error


class Feeder:
    """Feeds training prompts in order; nothing is skipped or doubled by a crash or a takeover."""

    def __init__(self, seat: Seat, source: PromptSource) -> None:
        self._seat, self._source = seat, source
        self._cursor = Cursor()
        self._full_until = 0.0
        self.fed_groups = 0

    @property
    def data_ended(self) -> bool:
        """Whether a finite mixture has been fed whole."""
        return self._cursor.ended

    @property
    def redis_full(self) -> bool:
        """Whether Redis refused a feeding just now.

        It is tried again every second while feeding is wanted; a refusal that was not repeated is
        over, or hinders nobody.
        """
        return time.monotonic() < self._full_until + _FULL_PAUSE_S

    async def restore(self) -> None:
        """Find the place: the broker's cursor, or the newest checkpoint's when Redis is empty.

        Again where Redis may have lost its tail: the last feedings, or all.
        """
        stored = await self._seat.broker.data_cursor()
        if stored:
            self._cursor = Cursor.from_json(stored)
            log.info("feeding goes on", next_index=self._cursor.next_index)
            return
        self._cursor = await asyncio.to_thread(_first_cursor, self._seat.run_dir)
        # Stored before anything else is fed: an empty cursor means an empty Redis, nothing else.
        request = f"cursor:{self._seat.fence.token}:{self._cursor.life}"
        fence, cursor = self._seat.fence, self._cursor.to_json()
        if await self._seat.broker.feed(fence, request, [], cursor) < 0:
            self._full_until = time.monotonic() + _FULL_PAUSE_S
        if self._cursor.life:
            log.warning(
                "redis has no data cursor: going on from the newest checkpoint",
                life=self._cursor.life,
                closed_below=self._cursor.closed.low,
            )

    async def feed(self, count: int) -> list[str]:
        """Feed up to ``count`` groups; ids of those that can be generated, in order.

        Fewer when the data end or prompts are bad (these count: the breaker must be looked at
        before many more are tried), none while Redis is full (tried again a second later).
        """
        fed: list[str] = []
        left = count
        while left > 0 and not self.data_ended and time.monotonic() >= self._full_until:
            wanted = min(GROUPS_A_CALL, left)
            cursor = self._cursor
            walk = PromptCursor(self._source, cursor.closed.is_closed, cursor.suffix)
            groups, index, ended = await asyncio.to_thread(walk.collect, cursor.next_index, wanted)
            if not await self._feed_script(groups, replace(cursor, next_index=index, ended=ended)):
                break
            fed += [group.group_id for group in groups if not group.quarantine_reason]
            self.fed_groups += len(groups)
            left -= wanted
            crashpoints.reach("fed")
        return fed

    async def _feed_script(self, groups: list[NewGroup], cursor: Cursor) -> bool:
        """One feeding; False when Redis is full or has lost the last ones."""
        broker, fence = self._seat.broker, self._seat.fence
        request = f"feed:{fence.token}:{cursor.life}:{self._cursor.next_index}-{cursor.next_index}"
        try:
            reply = await broker.feed(
                fence, request, groups, cursor.to_json(), self._cursor.to_json()
            )
        except InvariantError:
            # After a rollback the learner's journal may have brought groups back already.
            missing = [g for g in groups if await broker.group(g.group_id) is None]
            if len(missing) == len(groups):
                raise
            log.warning("groups were there already", there=len(groups) - len(missing))
            reply = await broker.feed(
                fence, request + "+", missing, cursor.to_json(), self._cursor.to_json()
            )
        if reply == -2:
            log.warning("redis lost its tail: feeding goes on from the cursor that it has")
            await self.restore()
            return False
        if reply < 0:
            self._full_until = time.monotonic() + _FULL_PAUSE_S
            log.warning("redis is full: feeding waits", groups=len(groups))
            return False
        self._full_until, self._cursor = 0.0, cursor
        return True

    async def finish(self) -> bool:
        """Let the run finish: the data are fed whole. False when Redis has lost feedings since;
        then those are to be fed again."""
        if await self._seat.broker.end_feeding(self._seat.fence, self._cursor.to_json()):
            return True
        log.warning("redis lost its tail: the data have not ended")
        await self.restore()
        return False


def may_feed(poll_phase: str, paused: bool, backlog: Backlog) -> str:
    """Empty when feeding is allowed; else why it is not."""
    if poll_phase != "running":
        return f"the run is {poll_phase}"
    if paused:
        return "paused by hand"
    if backlog.paused_feeding:
        return f"quarantine breaker: {backlog.paused_feeding}"
    return ""


def _first_cursor(run_dir: Path) -> Cursor:
    """The cursor for a Redis that has none: index 0, or a later life from the checkpoint."""
    lives = run_dir / _LIVES_FILE
    try:
        life = int(json.loads(lives.read_text(encoding="utf-8"))["life"]) + 1
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        life = 0
    run_dir.mkdir(parents=True, exist_ok=True)
    temporary = lives.with_suffix(".tmp")
    temporary.write_text(json.dumps({"life": life}) + "\n", encoding="utf-8")
    temporary.replace(lives)
    closed = checkpoint_position(run_dir)
    return Cursor(next_index=closed.low, life=life, closed=closed)


def checkpoint_position(run_dir: Path) -> DataPosition:
    """The data position of the newest checkpoint; the beginning when there is none.

    Newest as the learner sees it: by journal life, then by step. A later life may have begun
    from an older step.
    """
    found = [
        (int(name[3]), int(name[1]), meta)
        for meta in run_dir.glob("checkpoints/step*/meta.json")
        if (name := _CHECKPOINT.match(meta.parent.name))
    ]
    for _life, _step, meta in sorted(found, reverse=True):
        try:
            fields: Any = json.loads(meta.read_text(encoding="utf-8"))
            return DataPosition.from_json(str(fields["data_position"]))
        except (OSError, *MALFORMED_JSON, CheckpointError) as error:
            log.warning("checkpoint without a data position", file=str(meta), why=str(error))
    return DataPosition()


__all__ = ["Cursor", "Feeder", "checkpoint_position", "group_id", "may_feed"]
