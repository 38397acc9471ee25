"""A worker's session with the broker: heartbeats, what they bring, a new session when lost."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Mapping

from ringasync.broker.client import Broker
from ringasync.broker.types import Poll
from ringasync.observability.log import get_logger

Status = Mapping[str, str | int | float]

log = get_logger()


class SessionKeeper:
    """Renews the session and keeps the newest poll.

    ``lost`` is set when the broker says that the session ended: its leases belong to others, and
    nothing may be generated for them any more. ``changed`` is set with every poll that differs.
    """

    def __init__(
        self,
        broker: Broker,
        worker_id: str,
        *,
        ttl_ms: int,
        heartbeat_ms: int,
        info: Mapping[str, str],
        status: Callable[[], Status],
        changed: asyncio.Event,
    ) -> None:
        self._broker = broker
        self._worker_id = worker_id
        self._ttl_ms = ttl_ms
        self._heartbeat_s = heartbeat_ms / 1000
        self._info = {**info, "worker": worker_id}
        self._status = status
        self._changed = changed
        self.session_id = ""
        self.lost = False
        self._poll: Poll | None = None
        self._listeners: list[Callable[[Status], None]] = []

    def listen(self, listener: Callable[[Status], None]) -> None:
        """Call ``listener`` with each status that a heartbeat is about to send."""
        self._listeners.append(listener)

    @property
    def poll(self) -> Poll:
        """What the newest heartbeat brought; there is one once ``open`` returned."""
        if self._poll is None:
            raise RuntimeError("no session was opened yet")
        return self._poll

    async def open(self) -> None:
        """Begin a new session under a new id and poll once."""
        session_id = f"{self._worker_id}.{secrets.token_hex(3)}"
        await self._broker.open_session(session_id, "worker", self._ttl_ms, self._info)
        self.session_id, self.lost = session_id, False
        await self.beat()

    async def beat(self) -> Poll:
        """One heartbeat."""
        session_id, status = self.session_id, self._status()
        for listener in self._listeners:
            listener(status)
        poll = await self._broker.heartbeat(session_id, self._ttl_ms, status)
        if session_id == self.session_id:
            if not poll.alive:
                self.mark_lost()
            if poll != self._poll:
                self._changed.set()
            self._poll = poll
        return poll

    def mark_lost(self) -> None:
        """The broker refused something because the session ended."""
        if not self.lost:
            log.warning("session lost: its rollouts belong to others now", session=self.session_id)
        self.lost = True
        self._changed.set()

    async def run(self) -> None:
        """Beat for ever.

        Consumes: the poll. Produces: heartbeats and ``changed``. Waits for: its interval, and Redis
        within the retry budget. Ended by: its owner, or the budget's end.
        """
        while True:
            await asyncio.sleep(self._heartbeat_s)
            if not self.lost:
                await self.beat()

    async def close(self) -> None:
        """End the session; what it still leases returns at once."""
        if self.session_id and not self.lost:
            with contextlib.suppress(OSError):
                await self._broker.close_session(self.session_id)
