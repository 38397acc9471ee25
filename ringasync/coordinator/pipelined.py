"""The pipelined schedule: asks the admission gate and feeds what it admits."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from ringasync.broker.types import Backlog, Outcome, Poll
from ringasync.config.schema import Config
from ringasync.coordinator.feeder import Feeder
from ringasync.coordinator.seat import Seat
from ringasync.observability.log import get_logger
from ringasync.scheduling.admission import Admission, GateSettings, GateView, admit
from ringasync.scheduling.lag import OvertakingTracker, VersionLag
from ringasync.scheduling.length_estimate import LengthEstimate

_SESSIONS_EVERY_S = 0.25
_CHECK_OLDEST_EVERY_S = 5.0

log = get_logger(__name__)


def gate_settings(config: Config) -> GateSettings:
    """The gate of a run."""
    schedule = config.schedule
    return GateSettings(
        budget_tokens=schedule.budget.tokens,
        max_staleness=schedule.max_staleness,
        group_size=schedule.group_size,
        overtaking_weight=schedule.overtaking_weight,
    )


class PipelinedSchedule:
    """Called by the director at every turn. Listens to outcomes for lengths and completions."""

    def __init__(self, seat: Seat, feeder: Feeder, recent_lengths: Sequence[int]) -> None:
        self._seat, self._feeder = seat, feeder
        self._gate = gate_settings(seat.config)
        self.estimate = LengthEstimate(float(seat.config.sampling.max_new_tokens))
        self.estimate.observe(recent_lengths)
        self._overtaking = OvertakingTracker()
        self._lag = VersionLag()
        self._worker_versions: list[int] = []
        self._sessions_s = self._oldest_s = 0.0
        self._incarnations = seat.incarnations
        self.last: Admission | None = None

    def on_outcome(self, outcome: Outcome) -> None:
        """A group became complete or ended."""
        if outcome.kind != "train" or outcome.rollout_id:
            return
        self._overtaking.complete(outcome.group_id)
        if outcome.end in ("ready", "filtered"):
            self.estimate.observe(outcome.lengths)

    async def turn(self, poll: Poll, backlog: Backlog, ledger: Mapping[str, int]) -> str:
        """Feed what the gate admits; returns why no more."""
        await self._look_around()
        trained = ledger.get("trained", 0) + ledger.get("masked", 0)
        view = self._view(poll, backlog, ledger, trained)
        self.last = decision = admit(view, self._gate, self.estimate.mean_tokens)
        if decision.groups == 0:
            return decision.reason
        fed = await self._feeder.feed(decision.groups)
        self._overtaking.admitted(fed, trained - view.unloaded_tokens)
        if fed:
            log.debug("fed", groups=len(fed), why=decision.reason)
        return f"fed {len(fed)} groups: {decision.reason}"

    def _view(
        self, poll: Poll, backlog: Backlog, ledger: Mapping[str, int], trained: int
    ) -> GateView:
        unloaded = self._lag.unloaded_tokens(
            trained_tokens=trained,
            latest_version=poll.latest_version,
            worker_versions=self._worker_versions,
            pinned=poll.pin_version is not None,
            now_s=time.monotonic(),
        )
        return GateView(
            known_tokens=backlog.admitted_tokens_known,
            unfinished_rollouts=backlog.admitted_rollouts_unfinished,
            # The ledger's open account holds held-out tokens too while an evaluation runs.
            unfinished_tokens=ledger.get("open", 0) if backlog.eval_open == 0 else 0,
            waiting_tokens=backlog.ready_tokens + backlog.reserved_tokens + backlog.taken_tokens,
            running=backlog.open_rollouts + backlog.grading_jobs,
            overtaken_tokens=self._overtaking.overtaken_tokens(trained),
            unloaded_tokens=unloaded,
        )

    async def _look_around(self) -> None:
        now = time.monotonic()
        if self._incarnations != self._seat.incarnations:
            self._incarnations = self._seat.incarnations
            self._overtaking.clear()
            await self._feeder.restore()
        if now - self._sessions_s >= _SESSIONS_EVERY_S:
            self._sessions_s = now
            rows = await self._seat.broker.sessions()
            self._worker_versions = [
                int(row["policy_version"])
                for row in rows
                if row.get("role") == "worker" and row.get("policy_version", "").isdecimal()
            ]
        oldest = self._overtaking.oldest
        if oldest is not None and now - self._oldest_s >= _CHECK_OLDEST_EVERY_S:
            self._oldest_s = now
            group = await self._seat.broker.group(oldest)
            # Its end may have been lost with Redis's tail: it must not hold the gate for ever.
            if group is None or group.get("state") != "open":
                self._overtaking.complete(oldest)
