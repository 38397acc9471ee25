"""The ``rounds`` schedule: carries out what the round machine of Algorithm 1 decides."""

from __future__ import annotations

from collections.abc import Mapping

from ringasync.broker.types import Backlog, Poll
from ringasync.config.schema import Config
from ringasync.coordinator.feeder import Feeder
from ringasync.coordinator.seat import Seat
from ringasync.errors import InvariantError
from ringasync.observability.log import get_logger
from ringasync.runtime import crashpoints
from ringasync.scheduling.rounds import RoundAction, RoundSettings, RoundView, next_action

_MAX_ACTIONS_A_TURN = 8

log = get_logger(__name__)


def round_settings(config: Config) -> RoundSettings:
    """The rounds of a run."""
    schedule = config.schedule
    return RoundSettings(
        budget_tokens=schedule.budget.tokens,
        count=schedule.budget.count,
        pool_capacity=schedule.pool_capacity,
        group_size=schedule.group_size,
    )


class RoundsSchedule:
    """Called by the director at every turn; every step is one idempotent script."""

    def __init__(self, seat: Seat, feeder: Feeder) -> None:
        self._seat, self._feeder = seat, feeder
        self._settings = round_settings(seat.config)
        self._incarnations = seat.incarnations
        self.ended = False
        """True once the data have ended and no round is left to close."""

    async def turn(self, poll: Poll, backlog: Backlog, _ledger: Mapping[str, int]) -> str:
        """Act until the machine waits; returns what it waits for."""
        if self._incarnations != self._seat.incarnations:
            self._incarnations = self._seat.incarnations
            await self._feeder.restore()
        self.ended = False
        for _ in range(_MAX_ACTIONS_A_TURN):
            action = next_action(self._view(poll, backlog), self._settings)
            if action.kind == "end":
                self.ended = True
                return action.reason
            if action.kind == "wait" or not await self._act(action, poll):
                return action.reason
            poll, backlog = await self._seat.beat(), await self._seat.broker.backlog()
        return "busy"

    async def close_only(self, poll: Poll, backlog: Backlog) -> str:
        """While feeding is not allowed: a round that is full still closes and is handed over."""
        action = next_action(self._view(poll, backlog), self._settings)
        if action.kind in ("close", "to_training"):
            await self._act(action, poll)
        return action.reason

    def _view(self, poll: Poll, backlog: Backlog) -> RoundView:
        return RoundView(
            round_id=poll.round_id,
            state=poll.round_state,
            pool=backlog.open_rollouts,
            grading=backlog.grading_jobs,
            waiting_tokens=backlog.ready_tokens + backlog.reserved_tokens + backlog.taken_tokens,
            completed_tokens=backlog.finished_tokens_round,
            generated_tokens=backlog.generated_tokens_round,
            data_ended=self._feeder.data_ended,
        )

    async def _act(self, action: RoundAction, poll: Poll) -> bool:
        """Carry out one action; False when it has to be tried again later, also where a Redis that
        lost its tail has put the round back since ``poll``."""
        try:
            return await self._carry_out(action, poll)
        except InvariantError as error:
            now = await self._seat.beat()
            seen, found = ((one.round_id, one.round_state) for one in (poll, now))
            if seen == found:
                raise
            log.warning("the round is not where it was", seen=seen, found=found, why=str(error))
            return False

    async def _carry_out(self, action: RoundAction, poll: Poll) -> bool:
        broker, fence, schedule = self._seat.broker, self._seat.fence, self._seat.config.schedule
        if action.kind == "purge_and_open":
            number = action.round_id
            if schedule.retention_max is not None:
                request = f"purge:{poll.incarnation}:{number}"
                purged = await broker.purge(
                    fence, request, schedule.retention_max, schedule.purge_action
                )
                if purged:
                    log.info("purged", count=len(purged), ids=purged[:8], before_round=number)
            await broker.open_round(fence, f"open:{poll.incarnation}:{number}", number)
            log.info("round opened", round=number)
            return True
        if action.kind == "feed":
            return bool(await self._feeder.feed(action.groups)) or self._feeder.data_ended
        if action.kind == "close":
            request = f"close:{poll.incarnation}:{poll.round_id}"
            carried = await broker.close_round(fence, request, poll.round_id)
            log.info("round closed", round=poll.round_id, why=action.reason, carried_over=carried)
            crashpoints.reach("round_closed")
            return True
        handed_over = await broker.round_to_training(fence, poll.round_id)
        return handed_over
