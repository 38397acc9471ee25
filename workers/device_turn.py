"""A worker's side of a device that it shares with the learner (``schedule.colocated``).

The poll says whose turn it is by a number that only rises, odd while it is the learner's. In an odd
turn the engine sleeps and the worker's session says so (``asleep_turn``); until then the learner
waits. In an even one the worker takes up the newest weights and wakes.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from ringasync.broker.types import Poll
from ringasync.observability.log import get_logger
from ringasync.runtime import crashpoints
from workers.engine_control import DEVICE, EngineControl

log = get_logger()


class DeviceTurn:
    """Follows the turns. ``told`` is awaited when the learner should hear that this worker sleeps.

    Without a colocated learner the turn stays 0 and nothing here ever acts.
    """

    def __init__(self, control: EngineControl, told: Callable[[], Awaitable[object]]) -> None:
        self._control = control
        self._told = told
        self._turn = 0
        self._asleep_turn = 0
        self._since_s = 0.0
        self.asleep_s = 0.0
        """Seconds slept so far, ended sleeps only."""

    @property
    def is_asleep(self) -> bool:
        """Whether the engine, if there is one, has left the device."""
        return self._asleep_turn > 0

    @property
    def status(self) -> dict[str, str | int | float]:
        """What the session says of it; nothing where no turn was ever taken."""
        if not self._turn:
            return {}
        return {
            "device_turn": self._turn,
            "asleep_turn": self._asleep_turn,
            "asleep_s": round(self.asleep_s, 3),
        }

    def is_learners(self, poll: Poll) -> bool:
        """Whose turn it is. A Redis that lost its tail may say an older one: it does not count."""
        self._turn = max(self._turn, poll.device_turn)
        return self._turn % 2 == 1

    async def sleep(self) -> None:
        """Leave the device and say so; called in every tick of the learner's turn.

        Returns with the engine asleep. Raises ``EngineError`` when it cannot be brought to sleep.
        """
        if self._asleep_turn == self._turn:
            return
        began_s = time.monotonic()
        await self._control.sleep(DEVICE)
        if not self.is_asleep:
            self._since_s = time.monotonic()
            log.info("asleep", turn=self._turn, took_s=round(self._since_s - began_s, 3))
        self._asleep_turn = self._turn
        await self._told()
        crashpoints.reach("asleep", self._turn)

    async def wake(self) -> None:
        """Come back, with a swap behind it or without one. Raises ``EngineError``."""
        began_s = time.monotonic()
        await self._control.wake(DEVICE)
        now_s = time.monotonic()
        self.asleep_s += now_s - self._since_s
        log.info(
            "awake",
            turn=self._turn,
            asleep_s=round(now_s - self._since_s, 3),
            took_s=round(now_s - began_s, 3),
        )
        self._asleep_turn = 0
