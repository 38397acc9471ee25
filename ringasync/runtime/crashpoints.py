"""Points at which a role kills itself when a test says so: SIGKILL, nothing is cleaned up.

``RINGASYNC_CRASH_AT=journalled`` kills at every passage of that point, ``journalled:3`` only at
step 3, ``journalled:3@FILE`` only once: the file is made first and a point whose file exists is
passed. Without the variable nothing happens.
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
    where, _, once = wanted.partition("@")
    name, _, wanted_step = where.partition(":")
    if name != point or (wanted_step and step != int(wanted_step)):
        return
    if once and not _first_time(once):
        return
    os.kill(os.getpid(), signal.SIGKILL)


def _first_time(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True
