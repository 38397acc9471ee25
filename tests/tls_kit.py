"""TLS in front of a real Redis, also of one that was built without: a proxy with our own CA."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Authority:
    """A CA of the test's own, with files for settings."""

    ca: trustme.CA
    ca_file: Path

    @classmethod
    def make(cls, folder: Path) -> Authority:
        folder.mkdir(exist_ok=True)
        ca = trustme.CA()
        ca.cert_pem.write_to_path(str(folder / "ca.pem"))
        return cls(ca, folder / "ca.pem")

    def client_files(self) -> tuple[Path, Path]:
        """A client's certificate and its key."""
        return self._files("client", "worker@ring.test")

    def server_files(self, name: str) -> tuple[Path, Path]:
        """A certificate for a server at ``name``, and its key."""
        return self._files("server", name)

    def _files(self, stem: str, name: str) -> tuple[Path, Path]:
        issued = self.ca.issue_cert(name)
        folder = self.ca_file.parent
        issued.cert_chain_pems[0].write_to_path(str(folder / f"{stem}.pem"))
        issued.private_key_pem.write_to_path(str(folder / f"{stem}.key"))
        return folder / f"{stem}.pem", folder / f"{stem}.key"

    def server_context(self, name: str, *, asks_client: bool) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.ca.issue_cert(name).configure_cert(context)
        if asks_client:
            self.ca.configure_trust(context)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


@contextmanager
def tls_front(redis_port: int, context: ssl.SSLContext) -> Iterator[int]:
    """Serve TLS on a port of 127.0.0.1, forward to a plain Redis; yields the port."""
    port: Future[int] = Future()
    ended: Future[Callable[[], object]] = Future()

    async def serve() -> None:
        loop, end = asyncio.get_running_loop(), asyncio.Event()
        loop.set_exception_handler(lambda *_: None)  # clients that are refused on purpose
        server = await asyncio.start_server(
            lambda reader, writer: _connect(reader, writer, redis_port), "127.0.0.1", ssl=context
        )
        ended.set_result(lambda: loop.call_soon_threadsafe(end.set))
        port.set_result(server.sockets[0].getsockname()[1])
        await end.wait()
        server.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        yield port.result(20)
    finally:
        ended.result(20)()
        thread.join(20)


async def _connect(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, redis_port: int
) -> None:
    upstream_reader, upstream = await asyncio.open_connection("127.0.0.1", redis_port)
    both = [_copy(reader, upstream), _copy(upstream_reader, writer)]
    await asyncio.gather(*both, return_exceptions=True)


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while data := await source.read(1 << 16):
            sink.write(data)
            await sink.drain()
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        sink.close()
