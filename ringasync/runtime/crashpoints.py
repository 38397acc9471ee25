"""Points at which a role kills itself when a test says so: SIGKILL, nothing is cleaned up.

``RINGASYNC_CRASH_AT=journalled`` kills at the first passage of that point,
``RINGASYNC_CRASH_AT=journalled:3`` only at step 3. Without the variable nothing happens.
"""

from __future__ import annotations

import os
import signal

ENV = "RINGASYNC_CRASH_AT"


def reach(point: str, step: int | None = None) -> None:
    """Pass ``point``; does not return when the environment asks for a crash here."""
    wanted = os.environ.get(ENV)
    if not wanted:
        return
    name, _, wanted_step = wanted.partition(":")
    if name == point and (not wanted_step or step == int(wanted_step)):
        os.kill(os.getpid(), signal.SIGKILL)
