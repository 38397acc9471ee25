"""Verifiers that try to get out of the sandbox. Each returns 1 if it got out, 0 if it was stopped.

Some are stopped by being killed. They are published so that anybody can add one: docs/sandbox.md.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

_FILE_BYTES = 1 << 20
_FILES = 4096


def good(*_: Any) -> float:
    """Harmless: shows that the pool goes on."""
    return 0.5


def _succeeds(attempt: Callable[[], object]) -> float:
    try:
        attempt()
    except OSError:
        return 0.0
    return 1.0


def network(task: dict[str, Any], response: str) -> float:
    """Connects to the port of this machine that the response names."""
    return _succeeds(lambda: socket.create_connection(("127.0.0.1", int(response)), timeout=1))


def interfaces(*_: Any) -> float:
    """Whether there is any network interface but loopback."""
    return float(any(name != "lo" for _, name in socket.if_nameindex()))


def abstract_socket(task: dict[str, Any], response: str) -> float:
    """Connects to an abstract unix socket, which no file system guards."""
    client = socket.socket(socket.AF_UNIX)
    return _succeeds(lambda: client.connect("\0" + response))


def fork_bomb(*_: Any) -> float:
    """Forks in native code, behind Python's hooks, for as long as it can."""
    libc = ctypes.CDLL(None)
    forked = 0
    for _attempt in range(64):
        child = libc.fork()
        if child == 0:
            signal.pause()
        forked += child > 0
    return float(forked > 0)


def vfork_and_clone(*_: Any) -> float:
    """Asks the kernel itself for a process: clone3, clone, unshare (x86-64 and arm64 numbers)."""
    libc = ctypes.CDLL(None, use_errno=True)
    x86 = os.uname().machine == "x86_64"
    arguments = (ctypes.c_uint64 * 11)(0, 0, 0, 0, signal.SIGCHLD)
    calls: list[tuple[Any, ...]] = [
        (435, ctypes.byref(arguments), 88),
        (56 if x86 else 220, signal.SIGCHLD, 0, 0, 0, 0),
        (272 if x86 else 97, 0x10000000),
    ]
    escaped = 0
    for call in calls:
        result = libc.syscall(*call)
        if result == 0 and call[0] not in (272, 97):
            os._exit(0)
        escaped += result >= 0
    return float(escaped > 0)


def start_program(*_: Any) -> float:
    """Starts a program."""
    return _succeeds(lambda: subprocess.run(["/usr/bin/true"], check=False))


def fill_disk(*_: Any) -> float:
    """Writes four GiB wherever it can."""
    written = 0
    for folder in ("/tmp", "/dev/shm", "/dev", "/", "/var/tmp", "."):  # noqa: S108
        for number in range(_FILES):
            try:
                Path(folder, f"fill{number}").write_bytes(b"x" * _FILE_BYTES)
            except OSError:
                break
            written += _FILE_BYTES
    return float(written > 64 * _FILE_BYTES)


def write_outside(task: dict[str, Any], response: str) -> float:
    """Writes into the folders named by the response, and beside its own source."""
    folders = [*response.split("\n"), str(Path(__file__).parent), os.getcwd(), "/usr", "/etc"]
    return max(
        _succeeds(lambda folder=folder: Path(folder, "escaped").write_text("x"))  # type: ignore[misc]
        for folder in folders
    )


def read_outside(task: dict[str, Any], response: str) -> float:
    """Reads the file named by the response, and the machine's secrets."""
    files = [response, "/etc/shadow", "/etc/passwd", str(Path("/root/.ssh/id_rsa"))]
    return max(_succeeds(Path(file).read_bytes) for file in files)


def secrets(*_: Any) -> float:
    """Looks for passwords in every environment and command line that it can read."""
    found = [repr(dict(os.environ)).encode()]
    for file in [*Path("/proc").glob("*/environ"), *Path("/proc").glob("*/cmdline")]:
        with suppress(OSError):
            found.append(file.read_bytes())
    words = (b"RINGASYNC_REDIS_PASSWORD", b"AWS_SECRET", b"hunter2")
    return float(any(word in text for text in found for word in words))


def kill_parent(task: dict[str, Any], response: str) -> float:
    """Sends SIGKILL to the process of the response, to its parent and to everybody else."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sent = _succeeds(lambda: os.kill(int(response), signal.SIGKILL))
    with suppress(OSError):
        os.kill(os.getppid(), signal.SIGKILL)
    with suppress(OSError):
        os.kill(-1, signal.SIGKILL)
    return sent


def see_processes(task: dict[str, Any], response: str) -> float:
    """Whether the process of the response is in the table."""
    return float(Path("/proc", response).exists() and int(response) > 2)


def endless_output(*_: Any) -> float:
    """Writes to every descriptor without end."""
    while True:
        for descriptor in range(64):
            with suppress(OSError):
                os.write(descriptor, b"\xff" * 65536)


def balloon(*_: Any) -> float:
    """Takes memory without end."""
    kept = []
    while True:
        kept.append(bytearray(64 << 20))


def hidden_memory(*_: Any) -> float:
    """Takes memory that an address space limit does not count: memfd and System V segments."""
    libc = ctypes.CDLL(None)
    segment = libc.shmget(0, 256 << 20, 0o1600)
    return float(_succeeds(lambda: os.memfd_create("hidden")) > 0 or segment >= 0)


def busy_threads(*_: Any) -> float:
    """Burns processor time in several threads."""

    def burn() -> None:
        while True:
            pass

    for _thread in range(3):
        threading.Thread(target=burn, daemon=True).start()
    burn()
    return 1.0


def trace(*_: Any) -> float:
    """Attaches to the sandbox's first process."""
    return float(ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0)


def mount(*_: Any) -> float:
    """Makes the root writable again."""
    remount_writable = 0x20 | 0x1000
    return float(ctypes.CDLL(None).mount(b"none", b"/", None, remount_writable, None) == 0)


def has_proc(task: dict[str, Any], response: str) -> float:
    """Whether the kernel's table of processes is there."""
    return float(Path("/proc/self").exists())
