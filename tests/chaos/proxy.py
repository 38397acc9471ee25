"""A small TCP proxy before Redis, one listener for each role: it cuts, delays and holds up."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

_CHUNK_BYTES = 1 << 16
_T = TypeVar("_T")


class Link:
    """The way of one role to Redis. Set ``delay_s`` and ``is_held``; ``cut`` severs what is open.

    ``delayed_chunks`` and ``held_chunks`` count what was really hindered.
    """

    def __init__(self) -> None:
        self.port = 0
        self.delay_s = 0.0
        self.is_held = False
        self.delayed_chunks = 0
        self.held_chunks = 0
        self.open: set[asyncio.StreamWriter] = set()
        self._released = asyncio.Event()
        self._released.set()

    def hold(self, held: bool) -> None:
        """Let nothing through any more, in either direction, or let everything through again."""
        self.is_held = held
        (self._released.clear if held else self._released.set)()

    def cut(self) -> int:
        """Sever every open connection with a reset; how many there were."""
        severed = list(self.open)
        for writer in severed:
            writer.transport.abort()
        return len(severed) // 2  # both sides of each

    async def pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Consumes bytes of one side, produces them on the other; ends with either side."""
        with contextlib.suppress(OSError):
            while chunk := await reader.read(_CHUNK_BYTES):
                if self.delay_s:
                    self.delayed_chunks += 1
                    await asyncio.sleep(self.delay_s)
                if self.is_held:
                    self.held_chunks += 1
                    await self._released.wait()
                writer.write(chunk)
                await writer.drain()
        writer.transport.abort()


class Proxy:
    """All links, in a thread with an event loop of its own. Methods are for other threads.

    ``upstream`` is asked for Redis's port at each connection: the server may have moved.
    """

    def __init__(self, names: list[str], upstream: Callable[[], int]) -> None:
        self._upstream = upstream
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.links: dict[str, Link] = self._run(self._listen(names))

    @property
    def ports(self) -> dict[str, int]:
        """Where each role finds its Redis."""
        return {name: link.port for name, link in self.links.items()}

    def cut(self, name: str) -> int:
        """Sever the role's connections; how many."""
        return self._run(self._do(self.links[name].cut))

    def hold(self, name: str, held: bool) -> None:
        """Stop or release the role's bytes."""
        self._run(self._do(lambda: self.links[name].hold(held)))

    def close(self) -> None:
        """Sever everything and end the thread."""
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=30)

    async def _do(self, work: Callable[[], _T]) -> _T:
        return work()

    async def _listen(self, names: list[str]) -> dict[str, Link]:
        links = {}
        for name in names:
            link = Link()
            server = await asyncio.start_server(self._serve(link), "127.0.0.1", 0)
            link.port = server.sockets[0].getsockname()[1]
            self._servers.append(server)
            links[name] = link
        return links

    def _serve(
        self, link: Link
    ) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            if task is not None:
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            try:
                there, back = await asyncio.open_connection("127.0.0.1", self._upstream())
            except OSError:  # Redis is down: so is this way to it
                writer.transport.abort()
                return
            both = {writer, back}
            link.open |= both
            try:
                await asyncio.gather(link.pass_on(reader, back), link.pass_on(there, writer))
            finally:
                link.open -= both
                for end in both:
                    end.transport.abort()

        return serve

    async def _close(self) -> None:
        for server in self._servers:
            server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
