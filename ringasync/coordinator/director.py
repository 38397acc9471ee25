"""The director: one turn after another, from the first evaluation to the last."""

from __future__ import annotations

from collections.abc import Mapping

from ringasync.broker.types import Backlog, Poll
from ringasync.coordinator.evaluation import FIRST, LAST, Evaluator
from ringasync.coordinator.feeder import Feeder, may_feed
from ringasync.coordinator.pipelined import PipelinedSchedule
from ringasync.coordinator.rounds_loop import RoundsSchedule
from ringasync.coordinator.seat import Seat
from ringasync.coordinator.watchdog import Situation, Watchdog
from ringasync.observability.log import get_logger
from ringasync.records.states import Phase

TURN_EVERY_S = 0.05

log = get_logger(__name__)


class Director:
    """Decides in every turn what the run needs next.

    ``running``: evaluate when due, feed by the schedule. ``finishing`` once the learner has done
    its steps or the data have ended: nothing is fed, the learner trains what is left of ended
    data, the last evaluation runs under the final version. Then ``run`` returns True.
    """

    def __init__(
        self,
        seat: Seat,
        feeder: Feeder,
        evaluator: Evaluator,
        schedule: PipelinedSchedule | RoundsSchedule,
        watchdog: Watchdog,
    ) -> None:
        self._seat, self._feeder, self._evaluator = seat, feeder, evaluator
        self._schedule, self._watchdog = schedule, watchdog
        self._refusal = ""

    async def run(self) -> bool:
        """Direct the run.

        Consumes: backlog, ledger and poll. Produces: groups, rounds, evaluations, the phase.
        Waits for: its interval. Ended by: the run's end (True) or the seat's ``stop`` (False).
        """
        while not self._seat.stop.is_set():
            if await self.turn():
                return True
            await self._seat.pause(TURN_EVERY_S)
        return False

    async def turn(self) -> bool:
        """One turn; True once nothing is left to do."""
        broker = self._seat.broker
        poll = await self._seat.fresh_poll()
        backlog, ledger = await broker.backlog(), await broker.ledger()
        over = await self._training_is_over(poll, backlog)
        await self._evaluator.turn(poll, backlog, training_is_over=over)
        doing = await self._feed(self._seat.poll, backlog, ledger)
        if self._evaluator.running:
            doing = f"evaluation {self._evaluator.running}, {self._evaluator.missing} open; {doing}"
        self._seat.status["doing"] = doing
        await self._watchdog.look(
            Situation(
                poll,
                backlog,
                ledger,
                self._seat.config.schedule.budget.tokens,
                self._evaluator.running,
                self._feeder.redis_full,
                doing,
            )
        )
        return over and self._evaluator.done(LAST) and not self._evaluator.running

    async def _feed(self, poll: Poll, backlog: Backlog, ledger: Mapping[str, int]) -> str:
        refusal = may_feed(poll.phase, poll.paused, backlog)
        self._say_refusal(refusal if poll.phase == Phase.RUNNING else "")
        if not self._evaluator.first_is_fed and poll.phase == Phase.RUNNING:
            return f"waiting to feed the {FIRST} evaluation (needs a policy version)"
        if refusal:
            if isinstance(self._schedule, RoundsSchedule) and not poll.paused:
                return f"{refusal}; {await self._schedule.close_only(poll, backlog)}"
            return refusal
        doing = await self._schedule.turn(poll, backlog, ledger)
        # What was read before the turn does not know what the turn has fed.
        over = self._feeder.data_ended and self._data_are_over(await self._seat.broker.backlog())
        if over and await self._feeder.finish():
            log.info("the data have ended")
            await self._seat.beat()
        return doing

    def _data_are_over(self, backlog: Backlog) -> bool:
        """All prompts are fed, and nothing is open any more that a schedule would still close."""
        if isinstance(self._schedule, RoundsSchedule):
            return self._schedule.ended
        return backlog.open_groups == 0 and backlog.grading_jobs == 0

    async def _training_is_over(self, poll: Poll, backlog: Backlog) -> bool:
        """Whether the final version is out: all steps done, or all that the data gave trained."""
        steps = self._seat.config.learner.steps
        if poll.learner_step >= steps:
            await self._set_phase(Phase.FINISHING)
        if poll.phase != Phase.FINISHING and poll.learner_step < steps:
            return False
        left = backlog.ready_tokens + backlog.reserved_tokens + backlog.taken_tokens
        if poll.learner_step < steps and (left > 0 or backlog.open_groups > 0):
            return False
        # Anew: the learner may have taken the last batch between the poll and the backlog.
        poll = await self._seat.beat()
        latest = await self._seat.broker.version()
        return latest is not None and latest.learner_step >= poll.learner_step

    async def _set_phase(self, phase: Phase) -> None:
        if self._seat.poll.phase != phase:
            await self._seat.broker.set_phase(self._seat.fence, phase)
            await self._seat.beat()
            log.info("phase", phase=phase.value, learner_step=self._seat.poll.learner_step)

    def _say_refusal(self, refusal: str) -> None:
        if refusal != self._refusal:
            self._refusal = refusal
            if refusal:
                log.warning("feeding stopped", why=refusal)
            else:
                log.info("feeding goes on")
