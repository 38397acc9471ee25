"""Verifiers that misbehave, for the pool's tests; each takes whatever it is called with."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

_calls = 0


def good(*_: Any) -> float:
    """Half a point."""
    return 0.5


def truth(*_: Any) -> bool:
    """A bool, which is a number."""
    return True


def hang(*_: Any) -> float:
    """Never answers, deaf to gentle signals."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(1000)  # the pool must kill it


def burn(*_: Any) -> float:
    """Never answers and uses all of a core."""
    while True:
        pass


def fork(*_: Any) -> float:
    """Starts a process the ordinary way."""
    return float(os.fork() * 0)


def native_fork(*_: Any) -> float:
    """Starts a process behind Python's back, and both answer."""
    ctypes.CDLL(None).fork()
    return 1.0


def fork_away_and_hang(*arguments: Any) -> float:
    """A grandchild in a session of its own; both hang. Their ids go to a pipe, the response."""
    descriptor = os.open(_path_among(arguments), os.O_WRONLY)
    if ctypes.CDLL(None).fork() == 0:
        os.setsid()
        if ctypes.CDLL(None).fork():
            os._exit(0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    while True:
        time.sleep(1000)


def spawn(*_: Any) -> float:
    """Starts a shell."""
    return float(os.system("true"))  # noqa: S605  # refused before it starts


def leak(*_: Any) -> float:
    """Eats memory without end."""
    kept = []
    while True:
        kept.append(bytearray(64 << 20))


def write(*arguments: Any) -> float:
    """Writes a file of some size to the path that is its response."""
    Path(_path_among(arguments)).write_bytes(b"x" * 100_000)
    return 1.0


def _path_among(arguments: tuple[Any, ...]) -> str:
    return next(arg for arg in arguments if isinstance(arg, str) and arg.startswith("/"))


def raises(*_: Any) -> float:
    """Raises."""
    raise ValueError("no such answer")


def nan(*_: Any) -> float:
    """Answers NaN."""
    return float("nan")


def infinite(*_: Any) -> float:
    """Answers infinity."""
    return float("inf")


def nothing(*_: Any) -> None:
    """Answers nothing."""


def text(*_: Any) -> str:
    """Answers text that looks like a number."""
    return "1.0"


def chatter(*_: Any) -> float:
    """Prints garbage everywhere, and answers."""
    print("\x00\xff garbage" * 1000)
    sys.stderr.write("more")
    os.write(1, b"\xff" * 100_000)
    sys.stdout.flush()
    return 0.25


def corrupt(*_: Any) -> float:
    """Writes into every open descriptor it can find, frames included."""
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, b"\xff" * 64)
        except OSError:
            continue
    return 1.0


def leave(*_: Any) -> float:
    """Asks Python to exit."""
    sys.exit(3)


def exit_at_once(*_: Any) -> float:
    """Exits without a word."""
    os._exit(5)


def crash(*_: Any) -> float:
    """Dies of a segmentation fault."""
    ctypes.string_at(0)
    return 1.0


def recurse(*_: Any) -> float:
    """Recurses without end."""
    return recurse()


def armed(*_: Any) -> float:
    """Leaves an alarm behind that would kill the next job."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    return 1.0


def count(*_: Any) -> float:
    """How often this process was asked."""
    global _calls
    _calls += 1
    return float(_calls)


def secrets(*_: Any) -> float:
    """How many of ringasync's environment variables are seen."""
    return float(sum(key.startswith("RINGASYNC_") for key in os.environ))


def files(*_: Any) -> float:
    """How many files lie in the current folder."""
    return float(len(list(Path.cwd().iterdir())))


def by_length(*_: Any) -> float:
    """Another verdict each time."""
    return count() + os.getpid()


def slow(*_: Any) -> float:
    """Takes a while, but answers in time."""
    time.sleep(0.2)  # the work that a caller must wait for
    return 1.0
