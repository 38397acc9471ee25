"""Sends the lives of rollouts as traces once their group has ended (``observability.traces``).

Delivery: at most once in a coordinator's life, under ids that depend on the rollout alone; a new
coordinator sends the groups that Redis still lists again, under the same ids. A collector that does
not answer costs its traces, never the run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ringasync.coordinator.extras import module_of_extra
from ringasync.coordinator.seat import Seat
from ringasync.observability.lives import LifeSpan, is_traced, life_spans, trace_id
from ringasync.observability.log import get_logger

if TYPE_CHECKING:
    from ringasync.observability.otlp import LifeSender

TRACE_EVERY_S = 1.0
GROUPS_A_TURN = 32

log = get_logger(__name__)
Life = tuple[int, Sequence[LifeSpan]]


class LifeTracer:
    """See the module."""

    def __init__(self, seat: Seat, sender: LifeSender) -> None:
        self._seat, self._sender = seat, sender
        self._seen: set[str] = set()
        self._created_ms = ""
        self._is_failing = False

    async def run(self) -> None:
        """Trace.

        Consumes: the list of ended groups and their rollouts' histories. Produces: OTLP requests.
        Waits for: its interval, the collector for the sender's timeout. Ended by: ``stop``.
        """
        while not self._seat.stop.is_set():
            await self.trace()
            await self._seat.pause(TRACE_EVERY_S)

    async def trace(self) -> None:
        """Send every group that ended since the last call, up to the first failure."""
        ended = await self._seat.broker.ended_groups()
        share = self._seat.config.observability.traces_share
        fresh = [one for one in ended if one not in self._seen and is_traced(one, share)]
        for first in range(0, len(fresh), GROUPS_A_TURN):
            if not await self._send(fresh[first : first + GROUPS_A_TURN]):
                break
        self._seen = set(ended)

    def close(self) -> None:
        """End what is being sent."""
        self._sender.close()

    async def _send(self, group_ids: Sequence[str]) -> bool:
        lives: list[Life] = []
        for group_id in group_ids:
            lives += await self._lives(group_id)
        failed = await asyncio.to_thread(self._sender.send, lives)
        if failed and not self._is_failing:
            log.warning(
                "traces are not taken: they are lost until the collector answers",
                spans=failed,
                remedy="check observability.traces and OTEL_EXPORTER_OTLP_HEADERS",
            )
        elif self._is_failing and not failed and lives:
            log.info("traces are taken again")
        self._is_failing = bool(failed)
        return not failed

    async def _lives(self, group_id: str) -> list[Life]:
        broker = self._seat.broker
        if not self._created_ms:
            self._created_ms = (await broker.run_meta()).get("created_ms", "")
        group, lives = await broker.lives(group_id)
        return [
            (trace_id(broker.run, self._created_ms, life.id), life_spans(life, group))
            for life in lives
        ]


def make_tracer(seat: Seat) -> LifeTracer | None:
    """The tracer that the configuration asks for.

    Raises:
        EnvironmentRefusedError: it asks for one, and OpenTelemetry is not installed.
    """
    url = seat.config.observability.traces
    if not url:
        return None
    otlp = module_of_extra("ringasync.observability.otlp", "traces", "observability.traces")
    sender: LifeSender = otlp.LifeSender(url, seat.config.run.name)
    return LifeTracer(seat, sender)
