"""One child process in its own session: started, logged, asked to stop, killed with its brood."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""Read when numpy and torch load: several roles share the cores, so each gets its own share."""

LOG_TAIL_BYTES = 4096


@dataclass(frozen=True, slots=True)
class RoleSpec:
    """How a role's process is started. ``name`` also names its log file: ``worker-1``.

    ``essential``: when all essential roles have left, the run cannot go on.
    """

    name: str
    command: tuple[str, ...]
    essential: bool = False
    drain_timeout_s: float = 20.0
    environment: Mapping[str, str] = field(default_factory=dict)


def thread_environment(threads: int) -> dict[str, str]:
    """Environment that holds numpy and torch to ``threads`` threads.

    Threads of a pool wait asleep: roles share the cores with each other and with whatever else runs
    there, and threads that spin for one that has no core slow all of it down severalfold.
    """
    return {name: str(threads) for name in THREAD_VARIABLES} | {
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }


class RoleProcess:
    """A running role. Signals go to its whole process group, so that its children go with it."""

    def __init__(self, spec: RoleSpec, process: asyncio.subprocess.Process, log_path: Path) -> None:
        self.spec, self.log_path = spec, log_path
        self._process = process

    @classmethod
    async def start(cls, spec: RoleSpec, log_dir: Path) -> RoleProcess:
        """Start the role with both outputs appended to ``log_dir/NAME.log``.

        Raises:
            OSError: the command does not exist or cannot be run.
        """
        log_path = log_dir / f"{spec.name}.log"
        with log_path.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *spec.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **spec.environment},
                start_new_session=True,
            )
        return cls(spec, process, log_path)

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.returncode is None

    async def wait(self) -> int:
        """The exit code; negative: the number of the signal that ended it."""
        return await self._process.wait()

    def terminate(self) -> None:
        """Ask the role itself to drain; its children end when it tells them to."""
        with contextlib.suppress(ProcessLookupError):  # it may end between look and signal
            if self.is_running:
                self._process.terminate()

    def kill_group(self) -> None:
        """SIGKILL the role and all of its children, also those left over after its own end."""
        # The group's number is the role's own process id and stays taken while any member lives.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def log_tail(self, lines: int = 12) -> str:
        """The last lines that the role wrote."""
        with self.log_path.open("rb") as log:
            log.seek(max(0, self.log_path.stat().st_size - LOG_TAIL_BYTES))
            text = log.read().decode("utf-8", errors="replace")
        return "\n".join(text.splitlines()[-lines:])


def describe_exit(code: int) -> str:
    """An exit code in words: ``exit code 3``, ``killed by SIGKILL``."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
