"""Tasks that run beside each other and end together."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any


async def first_end(
    enders: Collection[asyncio.Task[Any]], helpers: Collection[asyncio.Task[Any]]
) -> None:
    """Wait until one of ``enders`` is done, or for the first failure of any, which is raised.

    A helper that ends without one is no longer waited for.
    """
    waiting: set[asyncio.Task[Any]] = {*enders, *helpers}
    while not any(task.done() for task in enders):
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
