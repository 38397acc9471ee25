"""``ringasync up`` with small roles, as a process that tests send signals to.

``python up_driver.py CONFIG SECONDS``: the one role ignores SIGTERM for SECONDS, then drains.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ringasync.cli.running import run_up
from ringasync.config.schema import Config
from ringasync.runtime.process import RoleSpec
from ringasync.runtime.roles import Place
from ringasync.runtime.shutdown import PARENT_PID_VARIABLE
from ringasync.runtime.up import UpOptions

ROLE = """
import os, sys, time
from ringasync.runtime.role import run_role
from ringasync.runtime.shutdown import Shutdown

async def main(shutdown: Shutdown) -> int:
    print("up", os.getpid(), flush=True)
    await shutdown.requested.wait()
    print("asked", flush=True)
    time.sleep(float(sys.argv[1]))
    print("drained", flush=True)
    return 0

raise SystemExit(run_role(main))
"""


def specs(_config: Config, _place: Place) -> list[RoleSpec]:
    command = (sys.executable, "-c", ROLE, sys.argv[2])
    parent = {PARENT_PID_VARIABLE: str(os.getpid())}
    return [RoleSpec("worker-1", command, True, 60.0, parent)]


if __name__ == "__main__":
    raise SystemExit(run_up(UpOptions(Path(sys.argv[1])), specs))
