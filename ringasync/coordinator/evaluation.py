"""Evaluation: the fixed held-out set under one pinned version, with the training sampling."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from ringasync.broker.types import Backlog, NewGroup, Poll
from ringasync.coordinator.history import EvalResult
from ringasync.coordinator.prompts import PromptSource
from ringasync.coordinator.recorder import Recorder
from ringasync.coordinator.seat import Seat
from ringasync.coordinator.statistics import mean_interval
from ringasync.errors import InvariantError
from ringasync.observability.log import get_logger
from ringasync.records.states import GroupState
from ringasync.runtime import crashpoints

FIRST, LAST = "first", "last"
_GROUPS_A_CALL = 64

log = get_logger(__name__)


class Evaluator:
    """Runs the evaluations that are due, one at a time, while training goes on.

    An evaluation is labelled ``first``, ``last`` or ``stepN``; its result is the ``eval`` line in
    ``metrics.jsonl``, and that line is also what says that it need not be run again.
    """

    def __init__(self, seat: Seat, source: PromptSource, recorder: Recorder) -> None:
        self._seat, self._source, self._recorder = seat, source, recorder
        self._label = ""
        self._version = 0
        self._expected: dict[str, str] = {}
        self._deadline_s = 0.0
        self._began_s = 0.0
        self._incarnations = seat.incarnations
        self._wanted = seat.config.eval.prompts > 0

    @property
    def running(self) -> str:
        """Label of the evaluation that is under way, else empty."""
        return self._label

    @property
    def missing(self) -> int:
        """Held-out prompts whose outcome is still awaited."""
        return len(self._expected.keys() - self._results().keys())

    def done(self, label: str) -> bool:
        """Whether this evaluation is recorded, or none is wanted."""
        return not self._wanted or label in self._recorder.history.evals

    @property
    def first_is_fed(self) -> bool:
        """Training prompts may follow: they wait behind the first evaluation's."""
        return self.done(FIRST) or self._label == FIRST

    async def turn(self, poll: Poll, _backlog: Backlog, *, training_is_over: bool) -> None:
        """Start what is due, finish what has all its outcomes or is out of time."""
        if self._label:
            if self.missing == 0:
                await self._conclude()
            elif self._incarnations != self._seat.incarnations:
                await self._feed_again()
            elif poll.paused:
                self._deadline_s = time.monotonic() + self._seat.config.eval.timeout_s
            elif time.monotonic() >= self._deadline_s:
                await self._give_up()
            return
        label = self._due(poll, training_is_over)
        if label:
            await self._start(label)
        elif poll.pin_version is not None:
            # A crash between recording the result and clearing the pin.
            await self._seat.broker.set_pin(self._seat.fence, False)

    def _due(self, poll: Poll, training_is_over: bool) -> str:
        if not self._wanted or poll.latest_version == 0 or poll.paused:
            return ""
        if not self.done(FIRST):
            return FIRST
        if training_is_over:
            return "" if self.done(LAST) else LAST
        every = self._seat.config.eval.every_steps
        if every == 0 or poll.phase != "running" or poll.learner_step < every:
            return ""
        label = f"step{poll.learner_step // every * every}"
        return "" if self.done(label) else label

    async def _start(self, label: str) -> None:
        """Pin the newest version and feed the held-out set; a repeat after a crash is harmless."""
        broker, fence = self._seat.broker, self._seat.fence
        incarnations = self._seat.incarnations
        version = await broker.set_pin(fence, True)
        if version is None:
            return
        groups = await asyncio.to_thread(self._source.eval_groups, label)
        for first in range(0, len(groups), _GROUPS_A_CALL):
            some = groups[first : first + _GROUPS_A_CALL]
            if not await self._feed(f"eval:{label}:{first}", some):
                return
        self._label, self._version = label, version
        self._incarnations = incarnations
        self._expected = {group.group_id: group.domain for group in groups}
        self._began_s = time.monotonic()
        self._deadline_s = self._began_s + self._seat.config.eval.timeout_s
        log.info("evaluation started", label=label, version=version, prompts=len(groups))
        crashpoints.reach("eval_fed")

    async def _feed_again(self) -> None:
        """Redis lost its tail: pin again and feed the held-out prompts that went with it."""
        incarnations, fence = self._seat.incarnations, self._seat.fence
        version = await self._seat.broker.set_pin(fence, True)
        if version is None:
            return
        late = self._expected.keys() - self._results().keys()
        groups = await asyncio.to_thread(self._source.eval_groups, self._label)
        lost = [g for g in groups if g.group_id in late and await self._is_unknown(g.group_id)]
        for first in range(0, len(lost), _GROUPS_A_CALL):
            # Not the first feeding's request: Redis may still know the answer to that.
            request = f"eval:{self._label}:again:{fence.token}:{incarnations}:{first}"
            if not await self._feed(request, lost[first : first + _GROUPS_A_CALL]):
                return
        log.warning(
            "evaluation goes on after a rollback",
            label=self._label,
            fed_again=len(lost),
            version=version,
            version_before=self._version,
        )
        self._version, self._incarnations = version, incarnations
        self._deadline_s = time.monotonic() + self._seat.config.eval.timeout_s

    async def _feed(self, request: str, groups: Sequence[NewGroup]) -> bool:
        broker, fence = self._seat.broker, self._seat.fence
        cursor = await broker.data_cursor()  # held-out prompts do not move it
        try:
            return await broker.feed(fence, request, groups, cursor, cursor) >= 0
        except InvariantError:
            missing = [g for g in groups if await self._is_unknown(g.group_id)]
            if len(missing) == len(groups):
                raise
            if not missing:
                return True
            return await broker.feed(fence, request + "+", missing, cursor, cursor) >= 0

    async def _is_unknown(self, group_id: str) -> bool:
        return await self._seat.broker.group(group_id) is None

    def _results(self) -> dict[str, EvalResult]:
        return self._recorder.history.eval_results.get(self._label, {})

    async def _give_up(self) -> None:
        """Out of time: what is missing ends without a verdict and is left out of the mean.

        It ends as ``evaluated`` without a reward: as quarantined it would trip the breaker. A
        group that Redis does not know (it lost its tail) has nothing to end.
        """
        late = sorted(self._expected.keys() - self._results().keys())
        timeout_s = self._seat.config.eval.timeout_s
        log.warning("evaluation out of time", label=self._label, missing=len(late), s=timeout_s)
        for group_id in late:
            if await self._is_unknown(group_id):
                continue
            reason = f"evaluation {self._label} was out of time after {timeout_s:g} s"
            await self._seat.broker.end_group(
                self._seat.fence, group_id, GroupState.EVALUATED, reason
            )
        await self._recorder.record()
        await self._conclude()

    async def _conclude(self) -> None:
        line = self._line()
        self._recorder.write(line)
        log.info(
            "evaluation done",
            label=self._label,
            version=self._version,
            mean=line["mean"],
            ci95=line["ci95"],
            n=line["n"],
        )
        self._label, self._expected = "", {}
        await self._seat.broker.set_pin(self._seat.fence, False)

    def _line(self) -> dict[str, object]:
        results = self._results()
        scored = [r for r in results.values() if r.reward is not None]
        interval = mean_interval([r.reward for r in scored if r.reward is not None])
        by_domain: dict[str, list[float]] = {}
        for result in scored:
            by_domain.setdefault(result.domain, []).append(result.reward or 0.0)
        return {
            "kind": "eval",
            "label": self._label,
            "version": self._version,
            "learner_step": self._seat.poll.learner_step,
            "mean": interval.mean if interval else None,
            "ci95": [interval.low, interval.high] if interval else None,
            "ci_method": interval.method if interval else None,
            "n": len(scored),
            "without_verdict": len(self._expected) - len(scored),
            "by_domain": {name: sum(v) / len(v) for name, v in sorted(by_domain.items())},
            "lengths": [r.length for r in scored],
            "took_s": round(time.monotonic() - self._began_s, 3),
            "at_ms": int(time.time() * 1000),
        }
