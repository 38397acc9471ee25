"""The learner's side of a device that it shares with the workers (``schedule.colocated``).

::

    ask (turn odd) --every worker sleeps--> onload --> train, publish --> offload --> return (even)

Whose turn it is stands in Redis as one number that only rises. A learner that dies with the device
leaves the turn odd: the workers sleep on until its successor has taken the turn over and given it
back. Nobody is asked twice, and no answer of an earlier turn counts.
"""

from __future__ import annotations

import asyncio
import time

import structlog

from learner.backends.base import Backend
from learner.keeper import Keeper
from learner.stall import StallWatch
from learner.worker_thread import TorchThread
from ringasync.broker.client import Broker
from ringasync.broker.types import Fence
from ringasync.config.schema import Config
from ringasync.errors import HandoverError
from ringasync.runtime import crashpoints

_POLL_S = 0.02


class DeviceTurn:
    """Takes the device when something is to be computed; does nothing unless ``colocated``."""

    def __init__(
        self,
        broker: Broker,
        fence: Fence,
        keeper: Keeper,
        backend: Backend,
        thread: TorchThread,
        config: Config,
    ) -> None:
        self._broker = broker
        self._fence = fence
        self._keeper = keeper
        self._backend = backend
        self._thread = thread
        self._colocated = config.schedule.colocated
        self._timeout_s = config.schedule.handover_timeout_s
        self._grace_ms = config.worker.session_ttl_ms
        self._stall = StallWatch(broker, config.learner.stall_report_s, keeper.say_stall)
        self._turn = 0
        self._since_s = 0.0
        self._log = structlog.get_logger(__name__)

    @property
    def is_held(self) -> bool:
        """Whether the backend's state is on the device."""
        return self._turn > 0

    async def take(self) -> float:
        """Have the device; returns the seconds that it took.

        Waits for: every worker with a session to say that it sleeps. Unblocked by: that, the end of
        a dead worker's session, or ``schedule.handover_timeout_s``, which raises ``HandoverError``.
        """
        if not self._colocated or self.is_held:
            return 0.0
        began_s = time.monotonic()
        self._stall.progress()
        doing = self._keeper.status.get("doing", "")
        self._keeper.status["doing"] = "waiting for the device"
        claim = await self._broker.take_device(self._fence, self._grace_ms)
        while claim.owed_by:
            owed = "; ".join(claim.owed_by)
            if self._stall.waited_s > self._timeout_s:
                raise HandoverError(
                    f"the device was not handed over within schedule.handover_timeout_s "
                    f"({self._timeout_s} s): owed by {owed}. Look at those workers' logs, or raise "
                    "the limit"
                )
            await self._stall.waiting("the device", workers=owed)
            await asyncio.sleep(_POLL_S)
            claim = await self._broker.take_device(self._fence, self._grace_ms)
        slept_s = time.monotonic() - began_s
        await self._thread.run(self._backend.onload)
        self._turn, self._since_s = claim.turn, time.monotonic()
        took_s = self._since_s - began_s
        self._keeper.status["doing"] = f"{doing} (has the device)"
        self._log.info(
            "device taken",
            turn=claim.turn,
            handover_s=round(slept_s, 3),
            onload_s=round(took_s - slept_s, 3),
        )
        crashpoints.reach("device_taken", claim.turn)
        return took_s

    async def give_back(self) -> float:
        """Leave the device, also one that a dead predecessor had; returns the seconds it took."""
        if not self._colocated:
            return 0.0
        began_s = time.monotonic()
        if not self.is_held:
            turn = self._keeper.poll.device_turn
            if turn % 2 and await self._broker.return_device(self._fence, turn):
                self._log.info("device of a predecessor handed back", turn=turn)
            return 0.0
        await self._thread.run(self._backend.offload)
        turn, self._turn = self._turn, 0
        # Logged first: once the broker knows, a worker may generate.
        self._log.info(
            "device handed back",
            turn=turn,
            held_s=round(began_s - self._since_s, 3),
            offload_s=round(time.monotonic() - began_s, 3),
        )
        await self._broker.return_device(self._fence, turn)
        return time.monotonic() - began_s
