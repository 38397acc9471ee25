"""What vLLM loads in every process of its own, by the entry point ``vllm.general_plugins``.

It registers the weight transfer engine, lets the scheduler pack log-probs, and sees to it that no
process of an engine outlives the worker that started it: EngineCore does not notice a SIGKILL of
its parent and would hold the GPU.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import select
import signal
import sys
import threading
from multiprocessing.util import Finalize

from workers.engines.vllm import packing

OWNER_VARIABLE = "RINGASYNC_ENGINE_OWNER"
"""Process id of the rollout worker; vLLM's processes end when it ends."""

TRANSFER_BACKEND = "ringasync"

_watching = threading.Lock()


def register() -> None:
    """Register the transfer engine and watch the owner; may be called often."""
    watch_owner()
    packing.install()
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    with contextlib.suppress(ValueError):  # registered already
        WeightTransferEngineFactory.register_engine(
            TRANSFER_BACKEND, "workers.engines.vllm.transfer", "FolderTransferEngine"
        )


def watch_owner() -> None:
    """In a child of the owner: die when the owner does, however it ends."""
    owner = int(os.environ.get(OWNER_VARIABLE, "0") or 0)
    if owner in (0, os.getpid()) or not _watching.acquire(blocking=False):
        return
    try:
        handle = os.pidfd_open(owner)
    except ProcessLookupError:
        _end()
    _end_soon_after_success()
    threading.Thread(target=_wait_for_end, args=(handle,), name="owner-watch", daemon=True).start()


def _wait_for_end(handle: int) -> None:
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    poll.poll()  # readable when the process has ended
    _end()


def _end_soon_after_success() -> None:
    """Do not let Python take apart all that vLLM imported when this process ends: it needs seconds,
    and vLLM kills what takes more than five. A process that failed keeps its exit code."""
    if multiprocessing.parent_process() is None:
        return  # how it ended would not be known
    succeeded = threading.Event()

    def note() -> None:
        error = sys.exc_info()[1]
        if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
            succeeded.set()  # vLLM leaves its loop by SystemExit

    def leave() -> None:
        if succeeded.is_set():
            os._exit(0)

    Finalize(None, note, exitpriority=0)  # where multiprocessing still holds the exception, if any
    atexit.register(leave)  # registered before the others, so it runs after them


def _end() -> None:
    # Not an exception in some thread: nothing may hold this process back.
    os.kill(os.getpid(), signal.SIGKILL)
