"""How a role stops: one signal drains it, a second ends it at once, a dead parent counts as one.

``SIGINT`` and ``SIGTERM`` mean the same. The first only sets an event: the role's loop sees it,
hands its work back and returns. The second ends the process at once with exit code 130; whatever
was not handed back is found by the coordinator when the session expires.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Mapping

import psutil

EXIT_INTERRUPTED = 130
"""Ended by a signal before the work was done (128 + SIGINT, as shells say it)."""

PARENT_PID_VARIABLE = "RINGASYNC_PARENT_PID"
"""Set by the supervisor: a role that finds its parent gone drains, then ends."""

PARENT_POLL_S = 0.5
PARENT_GRACE_S = 60.0
"""How long an orphan may drain before its watchdog ends it; above every default drain timeout."""

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Shutdown:
    """A request to stop, shared by the tasks of one role. Tasks wait for ``requested``.

    ``at_once`` runs before the exit on a second signal, inside the signal handler: keep it short.
    """

    def __init__(self, at_once: Callable[[], None] | None = None) -> None:
        self.requested = asyncio.Event()
        self._at_once = at_once
        self.reason = ""
        self._num_signals = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def is_requested(self) -> bool:
        return self.requested.is_set()

    def install(self) -> None:
        """Take over SIGINT and SIGTERM of this process. Call inside the running loop.

        The handlers run in the main thread between two bytecodes, so a second signal ends the
        process even while the event loop is held up by a long computation.
        """
        self._loop = asyncio.get_running_loop()
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def request(self, reason: str) -> None:
        """Ask for a drain from inside the loop; the first reason is kept."""
        if not self.requested.is_set():
            self.reason = reason
            self.requested.set()

    async def sleep(self, seconds: float) -> bool:
        """Sleep, but not through a stop: True when a stop was requested."""
        try:
            async with asyncio.timeout(seconds):
                await self.requested.wait()
        except TimeoutError:
            return False
        return True

    def _on_signal(self, number: int, _frame: object) -> None:
        self._num_signals += 1
        if self._num_signals > 1:
            if self._at_once is not None:
                self._at_once()
            os._exit(EXIT_INTERRUPTED)
        self.reason = self.reason or signal.Signals(number).name
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.requested.set)


def watch_parent(
    environment: Mapping[str, str] = os.environ, *, grace_s: float = PARENT_GRACE_S
) -> threading.Thread | None:
    """Drain this process when the supervisor named in the environment is gone.

    A thread, not a task: it must also end a role whose loop is stuck. Sends this process SIGTERM,
    and after ``grace_s`` ends it. None when no parent is named (a role started by hand stays).
    """
    named = environment.get(PARENT_PID_VARIABLE, "")
    if not named.isdecimal():
        return None
    thread = threading.Thread(
        target=_await_parent_end, args=(int(named), grace_s), name="parent-watchdog", daemon=True
    )
    thread.start()
    return thread


def _await_parent_end(parent_pid: int, grace_s: float) -> None:
    try:
        # Remembers the start time too, so that a reused process id is not taken for the parent.
        parent = psutil.Process(parent_pid)
        pause = threading.Event()
        while parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE:
            pause.wait(PARENT_POLL_S)
    except psutil.NoSuchProcess:
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(grace_s)
    os._exit(EXIT_INTERRUPTED)
