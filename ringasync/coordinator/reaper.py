"""Returns the work of dead sessions."""

from __future__ import annotations

from ringasync.coordinator.seat import Seat
from ringasync.observability.log import get_logger
from ringasync.runtime import crashpoints

REAP_EVERY_S = 1.0

log = get_logger(__name__)


class Reaper:
    """Every second, sessions past their deadline end and their rollouts are given to others.

    Consumes: expired sessions. Produces: parked, queued or finished rollouts with new tickets;
    quarantined groups. Waits for: its interval. Ended by: the seat's ``stop``.
    """

    def __init__(self, seat: Seat) -> None:
        self._seat = seat
        self.reaped_sessions = 0

    async def run(self) -> None:
        """Reap until told to stop."""
        while not self._seat.stop.is_set():
            await self.reap_once()
            await self._seat.pause(REAP_EVERY_S)

    async def reap_once(self) -> dict[str, int]:
        """Reap now; counts by what became of the work."""
        max_attempts = self._seat.config.schedule.max_attempts
        counts = await self._seat.broker.reap(self._seat.fence, max_attempts)
        dead = counts.get("sessions", 0)
        if dead:
            self.reaped_sessions += dead
            log.warning("dead sessions reaped", **counts)
            crashpoints.reach("reaped")
        return counts
