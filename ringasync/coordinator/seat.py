"""The coordinator's seat: its lock, its session, and what the broker last told it."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from ringasync.broker.client import Broker
from ringasync.broker.types import Fence, Poll
from ringasync.config.schema import Config
from ringasync.errors import LockHeldError
from ringasync.observability.log import get_logger
from ringasync.runtime.shutdown import Shutdown

ROLE = "coordinator"
_SAY_STANDBY_EVERY_S = 10.0
_POLL_AGE_S = 0.2

log = get_logger(__name__)


def owner_name() -> str:
    """Who holds the lock, for people: host and process."""
    return f"{ROLE}@{socket.gethostname()}:{os.getpid()}"


class Seat:
    """Held by one coordinator at a time; everything it changes carries ``fence``.

    ``finished`` is set by the director once the run is done; loops then end. ``status`` is what
    ``top`` shows. ``incarnations`` counts the Redis rollbacks seen in this life.
    """

    def __init__(
        self,
        broker: Broker,
        config: Config,
        shutdown: Shutdown,
        on_status: Callable[[Mapping[str, object]], None] = lambda _: None,
    ) -> None:
        self.broker, self.config, self.shutdown = broker, config, shutdown
        self._on_status = on_status
        self.status: dict[str, str | int | float] = {"doing": "starting", "stall": ""}
        self.stop = asyncio.Event()
        self._beating = asyncio.Lock()
        self.incarnations = 0
        self._fence: Fence | None = None
        self._poll: Poll | None = None
        self._session_id = ""
        self._polled_s = 0.0

    @property
    def fence(self) -> Fence:
        """Proof of the role; there is one once ``take`` returned True."""
        if self._fence is None:
            raise RuntimeError("the coordinator has not taken its seat")
        return self._fence

    @property
    def poll(self) -> Poll:
        """What the last heartbeat brought."""
        if self._poll is None:
            raise RuntimeError("the coordinator has not heard from the broker yet")
        return self._poll

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return self.config.run_dir

    @property
    def ttl_ms(self) -> int:
        """Lifetime of lock and session without renewal."""
        return self.config.worker.session_ttl_ms

    async def take(self) -> bool:
        """Wait for the role and take it; False when told to stop meanwhile.

        Waits for: the present holder to end or to miss its heartbeats; says who that is.
        Unblocked by: the lock, or a shutdown.
        """
        said = -_SAY_STANDBY_EVERY_S
        while not self.shutdown.is_requested:
            try:
                self._fence = await self.broker.acquire_lock(ROLE, owner_name(), self.ttl_ms)
                return True
            except LockHeldError as held:
                if time.monotonic() - said >= _SAY_STANDBY_EVERY_S:
                    said = time.monotonic()
                    log.info(
                        "standing by",
                        holder=held.owner,
                        heartbeat_age_ms=held.heartbeat_age_ms,
                        ttl_ms=self.ttl_ms,
                    )
            await self.shutdown.sleep(min(1.0, self.ttl_ms / 5000))
        return False

    async def beat(self) -> Poll:
        """Renew lock and session now. Raises ``FencedError`` when the role has passed on."""
        async with self._beating:  # two loops beat; a lost session must be opened again once only
            await self.broker.renew_lock(self.fence, self.ttl_ms)
            poll = await self._heartbeat() if self._session_id else None
            if poll is None or not poll.alive:
                await self._open_session()
                poll = await self._heartbeat()
            self._poll, self._polled_s = poll, time.monotonic()
            return poll

    async def fresh_poll(self) -> Poll:
        """A poll that is at most ``_POLL_AGE_S`` old: heartbeats cost writes in Redis."""
        if time.monotonic() - self._polled_s > _POLL_AGE_S:
            return await self.beat()
        return self.poll

    async def keep(self) -> None:
        """Hold the seat.

        Consumes: the broker's poll and Redis's run id. Produces: heartbeats; a new incarnation
        when Redis restarted. Waits for: a third of the lock's lifetime. Ended by: ``stop``.
        """
        while not self.stop.is_set():
            number = await self.broker.check_incarnation(self.fence)
            if number is not None:
                self.incarnations += 1
                log.warning("redis restarted: new incarnation, all leases are void", number=number)
            await self.beat()
            await self.pause(self.ttl_ms / 3000)

    async def leave(self) -> None:
        """Give lock and session back, so that a standby need not wait for their expiry."""
        if self._session_id:
            await self.broker.close_session(self._session_id)
        if self._fence is not None:
            await self.broker.release_lock(self._fence)

    async def pause(self, seconds: float) -> bool:
        """Sleep, but not through a stop; True when the coordinator must end."""
        try:
            async with asyncio.timeout(seconds):
                await self.stop.wait()
        except TimeoutError:
            return False
        return True

    async def _heartbeat(self) -> Poll:
        self._on_status(self.status)
        return await self.broker.heartbeat(self._session_id, self.ttl_ms, self.status)

    async def _open_session(self) -> None:
        self._session_id = f"{ROLE}.{secrets.token_hex(4)}"
        info = {"worker": ROLE, "host": socket.gethostname(), "pid": str(os.getpid())}
        await self.broker.open_session(self._session_id, ROLE, self.ttl_ms, info)
