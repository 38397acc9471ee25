"""Holds the engine while Redis takes no tokens, so that a crash loses no more than promised."""

from __future__ import annotations

import asyncio

from ringasync.errors import EngineError
from workers.buffers import RolloutStore
from workers.engine_control import EngineControl

_REASON = "unsent tokens"
_HALT_TOKENS = 4
"""What an engine may sample for one rollout while it comes to a halt, at the least."""


def gather_tokens(flush_tokens: int) -> int:
    """Tokens of one rollout that an engine may gather before it hands them out.

    A crash loses them too, so the more there may be, the earlier the throttle must hold.
    """
    return max(1, flush_tokens // 4)


class Throttle:
    """Bounds the unsent tokens of every rollout by two flushes' worth, held tokens aside."""

    def __init__(self, control: EngineControl, store: RolloutStore, flush_tokens: int) -> None:
        self._control = control
        self._store = store
        unseen = gather_tokens(flush_tokens) + max(_HALT_TOKENS, flush_tokens // 4)
        self._limit_tokens = max(flush_tokens, 2 * flush_tokens - unseen)
        self._look = asyncio.Event()

    def check(self) -> None:
        """Tokens came or went. Does not wait."""
        self._look.set()

    @property
    def is_over(self) -> bool:
        """Whether some rollout has as many unsent tokens as it may have."""
        return self._store.most_unsent_tokens() >= self._limit_tokens

    async def run(self) -> None:
        """Hold and release for ever.

        Consumes: ``check``. Waits for: a rollout over the limit. Unblocked by the flusher's
        progress, which calls ``check``. Ended by: its owner.
        """
        while True:
            await self._look.wait()
            self._look.clear()
            try:
                if self.is_over:
                    await self._control.hold(_REASON)
                else:
                    await self._control.release(_REASON)
            except EngineError as error:
                self._control.fail(error)
