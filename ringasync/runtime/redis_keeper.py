"""The embedded Redis of a run, watched: started again from its log on disk when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import redis.asyncio as aredis
from redis.exceptions import RedisError

from ringasync.broker.embedded import EmbeddedRedis
from ringasync.errors import RingError

CHECK_S = 0.5


class RedisKeeper:
    """An embedded server that outlives its own crashes, at the same address."""

    def __init__(self, folder: Path, maxmemory_bytes: int, say: Callable[[str], None]) -> None:
        self._server = EmbeddedRedis(folder, maxmemory_bytes)
        self._say = say
        self._process: psutil.Process | None = None

    @property
    def url(self) -> str:
        return self._server.url

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        """Start the server, or take over one that a killed supervisor left; stop it at the end.

        Raises:
            BrokerUnreachableError: it does not come up; the message holds the end of its log.
            EnvironmentRefusedError: no redis-server is installed.
        """
        await self._start()
        watch = asyncio.create_task(self._watch())
        try:
            yield self.url
        finally:
            watch.cancel()
            await asyncio.wait({watch})
            await self._server.stop()

    def stop_at_once(self) -> None:
        """SIGTERM, on which Redis writes its log out and ends; does not wait for it."""
        if self._process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._process.send_signal(signal.SIGTERM)

    async def _start(self) -> None:
        url = await self._server.start()
        async with aredis.from_url(url) as client:
            info = await client.info("server")
        self._process = psutil.Process(int(info["process_id"]))

    async def _watch(self) -> None:
        """Consumes deaths of the server, produces restarts; never ends by itself.

        A server that dies while it is being started is started again: roles wait for it within
        their retry budget, and end the run when that is spent.
        """
        while True:
            await asyncio.sleep(CHECK_S)
            if self._is_dead():
                self._say("the embedded Redis died; starting it again from its log")
                try:
                    await self._start()
                except (RingError, RedisError, OSError, psutil.NoSuchProcess) as error:
                    self._process = None
                    self._say(f"the embedded Redis did not come up, trying again: {error}")

    def _is_dead(self) -> bool:
        # A server that a killed supervisor left is nobody's child, so its process id is watched.
        return self._server.has_ended() or self._process is None or not self._process.is_running()
