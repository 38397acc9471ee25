"""A Redis that lost its tail while the learner was reading: told from a broken invariant."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import TypeVar

import structlog

from learner.keeper import Keeper
from ringasync.config.schema import Config
from ringasync.errors import InvariantError

_PATIENCE_S = 10.0
"""At least; else two lives of a session: the coordinator looks three times in one, and a standby
takes over in one."""
_POLL_S = 0.1

Answer = TypeVar("Answer")


class RolledBackError(Exception):
    """Redis is of a new incarnation; whoever was reading begins anew. Never leaves the loop."""


async def unless_rolled_back(
    call: Awaitable[Answer], keeper: Keeper, incarnation: int, config: Config
) -> Answer:
    """The answer of ``call``, which must leave nothing behind where it fails.

    Where it meets a broken invariant this waits for the coordinator to find that Redis lost its
    tail, and raises ``RolledBackError`` then; else that ``InvariantError``, some seconds later.
    """
    try:
        return await call
    except InvariantError as error:
        ttl_s = max(config.learner.lock_ttl_ms, config.worker.session_ttl_ms) / 1000
        deadline = time.monotonic() + max(_PATIENCE_S, 2 * ttl_s)
        while (await keeper.beat()).incarnation == incarnation:
            if time.monotonic() >= deadline:
                raise
            await asyncio.sleep(_POLL_S)
        structlog.get_logger(__name__).warning("redis lost its tail meanwhile", why=str(error))
        raise RolledBackError from error
