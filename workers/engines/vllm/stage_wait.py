"""What the ranks of vLLM answer of a staged folder: whether it is read, what the model holds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from ringasync.errors import EngineError

_POLL_S = 0.02


async def until_staged(
    states: Callable[[], Awaitable[Sequence[str]]], read_timeout_s: float, pull_s: float
) -> None:
    """Wait until all ranks have staged; files may have to be read after a pull that failed.

    ``states`` asks each rank. Raises ``EngineError`` when one failed, or at the end of both limits.
    """
    deadline_s = time.monotonic() + pull_s + read_timeout_s
    while True:
        found = await states()
        failed = [state for state in found if state.startswith("failed")]
        if failed:
            raise EngineError(failed[0].removeprefix("failed: "))
        if all(state == "ready" for state in found):
            return
        if time.monotonic() > deadline_s:
            raise EngineError(f"weights were not read in {read_timeout_s} s")
        await asyncio.sleep(_POLL_S)


def merged_digests(ranks: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Rank 0's digest of each tensor, or which other rank differs and how."""
    merged: dict[str, str] = {}
    for rank, digests in enumerate(ranks):
        for name, digest in digests.items():
            if rank == 0 or digest != merged[name]:
                merged[name] = digest if rank == 0 else f"rank {rank}: {digest}"
    return merged
