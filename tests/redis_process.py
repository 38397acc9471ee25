"""A real Redis with arguments of the test's own: users, passwords, other interfaces."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DEADLINE_S = 20.0


def free_port() -> int:
    """A port of the loopback interface on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def redis_process(binary: Path, folder: Path, *arguments: str) -> Iterator[int]:
    """Run ``redis-server`` until the end of the block; yields its port."""
    port = free_port()
    own = ["--port", str(port), "--dir", str(folder), "--save", "", "--appendonly", "yes"]
    with (folder / "redis.log").open("wb") as log:
        process = subprocess.Popen([str(binary), *own, *arguments], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not _listens(port):
            assert process.poll() is None, (folder / "redis.log").read_text()
            assert time.monotonic() < deadline, "redis-server does not listen"
            time.sleep(0.02)
        yield port
    finally:
        process.kill()
        process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
