"""What an engine sampled, written down at once when a test asks for it; it outlives a SIGKILL.

``RINGASYNC_TOKEN_TRACE=FOLDER`` makes each process append to ``FOLDER/PID`` one line for every
rollout and step: ``MS ROLLOUT TOKENS VERSION``, where ``TOKENS`` is the length of the whole
response, tokens of earlier leases included. Without the variable nothing happens.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

ENV = "RINGASYNC_TOKEN_TRACE"

Sampled = tuple[str, int, int]
"""A rollout, the tokens of its response so far, the version of the last one."""


class TokenTrace:
    """This process's trace."""

    def __init__(self, folder: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._file = os.open(folder / str(os.getpid()), flags, 0o644)

    def write(self, step: Sequence[Sampled]) -> None:
        """Note what one step sampled; the kernel has it when this returns."""
        now_ms = time.time_ns() // 1_000_000
        lines = [f"{now_ms} {rollout} {tokens} {version}\n" for rollout, tokens, version in step]
        os.write(self._file, "".join(lines).encode())


def wanted_trace() -> TokenTrace | None:
    """The trace that the environment asks for, or None."""
    folder = os.environ.get(ENV)
    return TokenTrace(Path(folder)) if folder else None
