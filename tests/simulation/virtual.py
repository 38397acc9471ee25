"""An event loop without real time: whatever would wait is due at once, in the order of its times.

Nothing in it waits for a socket or a thread, so a run is a function of the delays it is given.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import selectors
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from contextvars import Context
from typing import Any

import pytest

EPOCH_S = 1_700_000_000.0
"""What ``time.time`` says at the beginning."""

OnThread = Callable[[Callable[..., Any], tuple[Any, ...], bool], asyncio.Future[Any]]
"""Runs what production hands to a thread; True: to a thread of its own (torch)."""


class StuckError(AssertionError):
    """Every task waits for another one: no timer is left."""


class NumberedTask(asyncio.Task[Any]):
    """Its hash is its number: sets of tasks have the same order in every process."""

    def __init__(self, coro: Any, number: int, **options: Any) -> None:
        self.number = number
        super().__init__(coro, **options)

    def __hash__(self) -> int:
        return self.number


class _NoWait(selectors.SelectSelector):
    """Instead of waiting for sockets it moves the clock to the next timer."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise StuckError("nothing is due any more, and the run has not ended")
        self.now_s += timeout
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """``time`` begins at 0. Threads are replaced by ``on_thread``."""

    def __init__(self) -> None:
        self._no_wait = _NoWait()
        super().__init__(self._no_wait)
        self._tasks_made = 0
        self.on_thread: OnThread | None = None
        self.on_task: Callable[[NumberedTask], None] | None = None
        self.set_task_factory(self._make_task)  # type: ignore[arg-type]

    def time(self) -> float:
        return self._no_wait.now_s

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        assert self.on_thread is not None
        return self.on_thread(func, args, executor is not None)

    def _make_task(
        self,
        loop: asyncio.AbstractEventLoop,
        coro: Coroutine[Any, Any, Any],
        context: Context | None = None,
    ) -> NumberedTask:
        self._tasks_made += 1
        task = NumberedTask(coro, self._tasks_made, loop=loop, context=context)
        if self.on_task is not None:
            self.on_task(task)
        return task


@contextmanager
def virtual_process(loop: VirtualLoop, seed: int) -> Iterator[None]:
    """Within it the clocks are the loop's, and what is drawn by chance follows from ``seed``."""
    rng = random.Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", loop.time)
        patch.setattr(time, "time", lambda: EPOCH_S + loop.time())
        patch.setattr(secrets, "token_hex", lambda size=8: rng.randbytes(size).hex())
        patch.setattr(secrets, "randbelow", rng.randrange)
        yield
