"""What a process of a learner on several ranks knows of itself; loads no torch."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

LAUNCHER_PID_VARIABLE = "RINGASYNC_LAUNCHER_PID"
_PR_SET_PDEATHSIG = 1


def rank_of_this_process() -> int | None:
    """The rank that the launcher gave this process; None: it is not one of its ranks."""
    if not os.environ.get(LAUNCHER_PID_VARIABLE):
        return None
    return int(os.environ["RANK"])


def die_with_launcher() -> None:
    """Have the kernel kill this process when its launcher is gone, also by SIGKILL.

    Each rank is in a session of its own, where signals to the launcher's group do not reach it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != int(os.environ[LAUNCHER_PID_VARIABLE]):
        sys.exit("the learner's launcher is gone")  # before the kernel was told
