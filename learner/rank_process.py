"""What a process of a learner on several ranks knows of itself; loads no torch."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from ringasync.errors import RingError

LAUNCHER_PID_VARIABLE = "RINGASYNC_LAUNCHER_PID"
_PR_SET_PDEATHSIG = 1


def rank_of_this_process() -> int | None:
    """The rank that the launcher gave this process; None: it is not one of its ranks."""
    if not os.environ.get(LAUNCHER_PID_VARIABLE):
        return None
    return int(os.environ["RANK"])


def other_node(environment: Mapping[str, str]) -> int:
    """Which node this is beside node 0, to name its log; 0 for that, and for what is no number."""
    text = environment.get("PET_NODE_RANK", "")
    return int(text) if text.isascii() and text.isdigit() else 0


def die_with_launcher() -> None:
    """Have the kernel kill this process when its launcher is gone, also by SIGKILL.

    Each rank is in a session of its own, where signals to the launcher's group do not reach it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != int(os.environ[LAUNCHER_PID_VARIABLE]):
        sys.exit("the learner's launcher is gone")  # before the kernel was told


def tell_launcher(error: RingError) -> None:
    """Leave for the launcher what ends this rank, so that it can say it last, below the tracebacks
    of ranks that lost this one. Does nothing where no launcher began this process."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    if file and rank_of_this_process() is not None:
        told = {"message": f"{type(error).__name__}: {error}", "timestamp": int(time.time())}
        Path(file).write_text(json.dumps(told), encoding="utf-8")
