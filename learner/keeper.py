"""Keeps the learner's lock and session alive, and hears what the broker tells every role."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import Callable, Mapping

import structlog

from ringasync.broker.client import Broker
from ringasync.broker.types import Fence, Poll
from ringasync.errors import LockHeldError
from ringasync.runtime.shutdown import Shutdown

ROLE = "learner"


def owner_name() -> str:
    """Who holds the lock, for people: host and process."""
    return f"{ROLE}@{socket.gethostname()}:{os.getpid()}"


async def acquire_role(
    broker: Broker, ttl_ms: int, shutdown: Shutdown, *, wait: bool, report_s: float
) -> Fence | None:
    """Take the learner's lock.

    Waits for: the present holder to release it or to miss its heartbeats; says who that is.
    Unblocked by: the lock, or a shutdown (None). With ``wait`` off raises ``LockHeldError``.
    """
    log = structlog.get_logger(__name__)
    reported = -report_s
    loop = asyncio.get_running_loop()
    while not shutdown.is_requested:
        try:
            return await broker.acquire_lock(ROLE, owner_name(), ttl_ms)
        except LockHeldError as error:
            if not wait:
                raise
            if loop.time() - reported >= report_s:
                reported = loop.time()
                log.warning("waiting for the learner's lock", why=str(error))
        await shutdown.sleep(ttl_ms / 5000)
    return None


class Keeper:
    """Renews lock and session three times per ``ttl_ms``; ``poll`` is what it heard last.

    A session that expired (a long pause, a new incarnation) is opened again; a lost lock is not:
    ``run`` then raises ``FencedError`` and the learner must stop.
    """

    def __init__(
        self,
        broker: Broker,
        fence: Fence,
        ttl_ms: int,
        on_status: Callable[[Mapping[str, object]], None] | None = None,
    ) -> None:
        self._broker = broker
        self._fence = fence
        self._ttl_ms = ttl_ms
        self._on_status = on_status
        self._session_id = ""
        self._poll: Poll | None = None
        self.status: dict[str, str | int | float] = {}
        """Shown by ``ringasync top``; the loop writes it."""
        self.stall = ""
        """What is awaited too long, in words; shown too."""

    @property
    def poll(self) -> Poll:
        """The last answer; ``beat`` must have been called once."""
        if self._poll is None:
            raise RuntimeError("the keeper has not heard from the broker yet")
        return self._poll

    def say_stall(self, stall: str) -> None:
        """Show this with the status from now on."""
        self.stall = stall

    @property
    def _told(self) -> dict[str, str | int | float]:
        return {**self.status, "stall": self.stall}

    async def beat(self) -> Poll:
        """Renew now and return the fresh answer. Raises ``FencedError`` when the lock is lost."""
        if self._on_status is not None:
            self._on_status(self._told)
        await self._broker.renew_lock(self._fence, self._ttl_ms)
        if not self._session_id:
            await self._open_session()
        poll = await self._broker.heartbeat(self._session_id, self._ttl_ms, self._told)
        if not poll.alive:
            await self._open_session()
            poll = await self._broker.heartbeat(self._session_id, self._ttl_ms, self._told)
        self._poll = poll
        return poll

    async def run(self) -> None:
        """Beat for ever. Consumes nothing; waits for time; ends by cancellation or an error."""
        while True:
            await self.beat()
            await asyncio.sleep(self._ttl_ms / 3000)

    async def close(self) -> None:
        """End the session and give the lock up, so that a successor need not wait."""
        if self._session_id:
            await self._broker.close_session(self._session_id)
        await self._broker.release_lock(self._fence)

    async def _open_session(self) -> None:
        self._session_id = f"{ROLE}-{os.getpid()}-{secrets.token_hex(4)}"
        info = {"worker": owner_name(), "fence": str(self._fence.token)}
        info["host"] = socket.gethostname()
        await self._broker.open_session(self._session_id, ROLE, self._ttl_ms, info)
