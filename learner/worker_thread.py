"""One thread for all torch calls, so that the event loop keeps the lock and the session alive."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


class TorchThread:
    """Runs calls one after the other in one thread with a fixed number of torch threads."""

    def __init__(self, threads: int) -> None:
        self._executor = ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix="torch",
            initializer=torch.set_num_threads,
            initargs=(threads,),
        )

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Await ``call(*args, **kwargs)`` in the thread; cancelling the wait does not stop it."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, lambda: call(*args, **kwargs))

    def close(self) -> None:
        """Wait for the call in progress and end the thread."""
        self._executor.shutdown(wait=True, cancel_futures=True)
