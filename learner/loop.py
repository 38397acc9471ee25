"""The learner's loop: every accepted token is trained once, whatever dies in between.

::

    ready groups --reserve--> record --journal (fsync)--> commit --> train --> mark trained
                                                                        |
                            checkpoint (every N) <-- publish <----------+
                            (written beside the next batch: see publisher, checkpointer)

consumes       ready groups and the carry; in rounds, the round that the coordinator hands over
produces       journal records, checkpoints, policy versions, step metrics
waits for      Phi ready tokens (pipelined) or a round in state ``training`` (rounds)
unblocked by   graders finishing groups, the end of the data, a shutdown
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import structlog

from learner.algorithms.spikes import SpikeDetector
from learner.backends.base import Backend
from learner.batcher import Batcher, BatchRequest
from learner.catch_up import train_record, untrained_records
from learner.checkpoint import CheckpointMeta
from learner.checkpointer import Checkpointer
from learner.device_turn import DeviceTurn
from learner.devices import arithmetic
from learner.journal import Journal
from learner.keeper import Keeper
from learner.outcomes import note_closed_groups
from learner.publisher import Publication, Publisher
from learner.record import BatchRecord
from learner.recovery import reconcile
from learner.rolled_back import RolledBackError, unless_rolled_back
from learner.speed import SpeedGauge, shape_of_model
from learner.stall import StallWatch
from learner.state import LearnerState
from learner.step_metrics import StepTimes, TrainedStep, log_step, step_metrics
from learner.worker_thread import TorchThread
from ringasync.broker.client import Broker
from ringasync.broker.types import Fence
from ringasync.config.schema import Config
from ringasync.errors import InvariantError
from ringasync.observability.log import bind_identity
from ringasync.records.states import Phase
from ringasync.runtime import crashpoints
from ringasync.runtime.shutdown import Shutdown

_POLL_S = 0.05


class LearnerLoop:
    """Runs from the restored state to ``learner.steps``; one instance is one life."""

    def __init__(
        self,
        *,
        broker: Broker,
        fence: Fence,
        keeper: Keeper,
        backend: Backend,
        thread: TorchThread,
        journal: Journal,
        publisher: Publisher,
        state: LearnerState,
        config: Config,
        shutdown: Shutdown,
        on_step: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        self._broker, self._on_step = broker, on_step
        self._fence = fence
        self._keeper = keeper
        self._backend = backend
        self._thread = thread
        self._journal = journal
        self._publisher = publisher
        self.state = state
        self._config = config
        self._shutdown = shutdown
        self._batcher = Batcher(broker, fence, config)
        self._device = DeviceTurn(broker, fence, keeper, backend, thread, config)
        self._checkpointer = Checkpointer(
            broker, fence, backend, thread, config, state.checkpoint_step
        )
        self._stall = StallWatch(broker, config.learner.stall_report_s, keeper.say_stall)
        self._arithmetic = arithmetic(config.learner)
        self._speed = SpeedGauge(shape_of_model(config), config.learner, self._arithmetic)
        self._spikes = SpikeDetector(
            config.learner.grad_spike_window_steps, config.learner.grad_spike_factor
        )
        self._incarnation = keeper.poll.incarnation
        self._complete = False
        self._log = structlog.get_logger(__name__)

    async def run(self) -> None:
        """Catch up with the journal, then train to the end or to a shutdown; checkpoint at both.

        Raises ``CheckpointError`` when everything is trained but that last one cannot be written.
        """
        try:
            await self._run()
        finally:
            await asyncio.gather(self._publisher.close(), self._checkpointer.close())

    async def _run(self) -> None:
        await self._catch_up()
        await self._publish_before_all()
        await self._device.give_back()
        pipelined = self._config.schedule.mode == "pipelined"
        going = True
        while going and not self._finished():
            if self._keeper.poll.incarnation != self._incarnation:
                await self._meet_new_incarnation()
            with contextlib.suppress(RolledBackError):
                going = await (self._pipelined_step() if pipelined else self._rounds_step())
        await self._device.give_back()
        self._status("saving")
        await self._publisher.settle()
        await self._checkpointer.finish(self._meta(), self.state.carry)
        done = self._complete or self.state.step >= self._config.learner.steps
        self._status("done" if done else "stopped")
        await self._keeper.beat()
        self._log.info(
            "learner ends", step=self.state.step, of_steps=self._config.learner.steps, done=done
        )

    def _finished(self) -> bool:
        phase_done = self._keeper.poll.phase == Phase.DONE
        return (
            self.state.step >= self._config.learner.steps
            or self._shutdown.is_requested
            or phase_done
        )

    def _interrupted(self) -> bool:
        return self._finished() or self._keeper.poll.incarnation != self._incarnation

    # Steps

    async def _pipelined_step(self) -> bool:
        """Wait for Phi tokens and train them; False when the data have ended."""
        self._status("waiting for ready tokens")
        while not self._interrupted():
            began = time.monotonic()
            ended = self._keeper.poll.phase == Phase.FINISHING and await self._nothing_comes()
            record = await self._assemble(self._request(0, partial=ended))
            if record is not None:
                times = StepTimes(wait_s=began - self._stall_since())
                times.assemble_s = time.monotonic() - began
                await self._take_and_train(record, times)
                return True
            if ended:
                return self._data_ended()
            await self._wait(f"{self._config.schedule.budget.tokens} ready tokens")
        return True

    async def _rounds_step(self) -> bool:
        """Wait for the coordinator to hand a round over, train what is ready, finish the round."""
        self._status("waiting for a round")
        while not self._interrupted():
            await self._device.give_back()  # whoever held it: while a round is made it is theirs
            began = time.monotonic()
            poll = await self._keeper.beat()
            if poll.round_state == "training":
                times = StepTimes(wait_s=began - self._stall_since())
                await self._train_round(poll.round_id, times)
                return True
            if poll.phase == Phase.FINISHING and poll.round_state == "none":
                return await self._last_batches()
            await self._wait(f"round {poll.round_id} (now {poll.round_state}) to be handed over")
        return True

    async def _train_round(self, round_id: int, times: StepTimes) -> None:
        # A life that died between training and finish_round must not train the round twice.
        if self.state.last_round_id < round_id:
            began = time.monotonic()
            record = await self._assemble(self._request(round_id, partial=True))
            times.assemble_s = time.monotonic() - began
            if record is not None:
                await self._take_and_train(record, times)
            else:
                self._log.warning("round closed with nothing to train", round=round_id)
        await self._publish_if_new(times)
        await self._device.give_back()
        try:
            await self._broker.finish_round(self._fence, round_id)
        except InvariantError as error:
            poll = await self._keeper.beat()
            if (poll.round_id, poll.round_state) == (round_id, "training"):
                raise
            # A Redis that lost its tail: the coordinator hands what it knows of over again.
            self._log.warning("the trained round is not there to finish", why=str(error))
        self._stall.progress()

    async def _last_batches(self) -> bool:
        """Rounds: no more will be opened. Train what is left; False once there is nothing."""
        if not await self._nothing_comes():
            await self._wait("the last groups to be graded")
            return True
        record = await self._assemble(self._request(0, partial=True))
        if record is None:
            return self._data_ended()
        await self._take_and_train(record, StepTimes())
        return True

    def _data_ended(self) -> bool:
        self._log.info("the data have ended", step=self.state.step)
        self._complete = True
        return False

    async def _assemble(self, request: BatchRequest) -> BatchRecord | None:
        assembling = self._batcher.assemble(request)
        return await unless_rolled_back(assembling, self._keeper, self._incarnation, self._config)

    def _request(self, round_id: int, *, partial: bool) -> BatchRequest:
        return BatchRequest(
            self.state.step,
            self.state.carry,
            self.state.policy_version,
            self._incarnation,
            round_id,
            partial,
        )

    async def _nothing_comes(self) -> bool:
        backlog = await self._broker.backlog()
        return backlog.open_rollouts == 0 and backlog.open_groups == 0

    async def _take_and_train(self, record: BatchRecord, times: StepTimes) -> None:
        """Journal, commit, train, mark, publish, checkpoint: the only way a batch is trained."""
        began = time.monotonic()
        again = self._journal.holds(record.trajectories_per_group)
        if again:  # Redis lost its tail and nobody has noticed yet
            self._log.warning("groups that were taken before are ready again", groups=again)
            await self._broker.release(self._fence, record.batch_id)
            await self._reconcile()
            return
        self._status("training")
        entry = await asyncio.to_thread(self._journal.append, record)
        crashpoints.reach("journalled", record.step)
        await self._agreed(record, commit=True)
        crashpoints.reach("committed", record.step)
        times.journal_s = time.monotonic() - began
        done = await self._train(record, entry.end, times)
        await note_closed_groups(self._broker, self.state)
        await self._publish_if_new(times)
        times.handover_s += await self._device.give_back()
        if self.state.step % self._config.learner.checkpoint_every_steps == 0:
            times.checkpoint_s += await self._checkpointer.begin(self._meta(), self.state.carry)
        await self._report(done)
        self._stall.progress()

    async def _train(
        self, record: BatchRecord, end: int, times: StepTimes, *, replayed: bool = False
    ) -> TrainedStep:
        times.handover_s += await self._device.take()
        began = time.monotonic()
        batch, result = await self._thread.run(train_record, self._backend, record)
        times.train_s = time.monotonic() - began
        crashpoints.reach("stepped", record.step)
        times.publish_s += await self._publisher.settle()  # announced before more is marked
        await self._agreed(record, commit=False)
        crashpoints.reach("marked", record.step)
        self.state.advance(record, end, batch)
        return TrainedStep(record, batch, result, times, replayed)

    async def _agreed(self, record: BatchRecord, *, commit: bool) -> None:
        """Tell the broker of a journalled batch: taken (``commit``) or trained.

        A Redis that lost its tail may not know the batch any more; then the journal settles it.
        """
        for attempt in (1, 2):
            try:
                if commit:
                    await self._broker.commit(
                        self._fence, record.batch_id, record.trajectories_per_group
                    )
                else:
                    await self._broker.mark_trained(
                        self._fence, record.batch_id, record.trained_tokens(), record.step + 1
                    )
                return
            except InvariantError as error:
                if attempt == 2:
                    raise
                self._log.warning("the broker disagrees with the journal", why=str(error))
                await self._reconcile()

    # Recovery

    async def _catch_up(self) -> None:
        """Settle the journal with the broker and train again what the checkpoint lacks."""
        await self._reconcile()
        await self._publisher.learn_numbers(
            self.state.policy_version,
            *(entry.policy_version for entry in self._journal.entries),
        )
        started = self.state.step
        for entry, record in untrained_records(self._journal, self.state):
            if self._shutdown.is_requested:
                break
            self._status("catching up")
            done = await self._train(record, entry.end, StepTimes(), replayed=True)
            await self._report(done)
        self.state.fork_step = self.state.step
        if self.state.step > started:
            self._log.info("caught up from the journal", from_step=started, to_step=self.state.step)
        latest = await self._broker.version()
        same_line = self.state.step == started and latest is not None
        if same_line and latest is not None and latest.version == self.state.policy_version:
            self.state.published_step = latest.learner_step
        self._stall.progress()

    async def _reconcile(self) -> None:
        await reconcile(self._broker, self._fence, self._journal, self.state.journal_offset)

    async def _meet_new_incarnation(self) -> None:
        poll = self._keeper.poll
        self._log.warning("new incarnation", before=self._incarnation, now=poll.incarnation)
        self._incarnation = poll.incarnation
        await self._reconcile()
        await self._publisher.settle()
        await self._publisher.learn_numbers()
        poll = await self._keeper.beat()
        if poll.latest_version < self.state.policy_version:
            self.state.published_step = -1  # Redis forgot the announcement: say it again
            await self._publish_before_all()

    # After a step

    async def _publish_if_new(self, times: StepTimes) -> None:
        if self.state.published_step == self.state.step or self._behind():
            return
        times.handover_s += await self._device.take()  # the probe is computed
        began = time.monotonic()
        pinned = (await self._keeper.beat()).pin_version
        protect = () if pinned is None else (pinned,)
        publication = Publication(
            self.state.step, self.state.fork_step, self.state.last_batch, protect
        )
        self.state.policy_version = await self._publisher.begin(publication)
        self.state.published_step = self.state.step
        bind_identity(policy_version=self.state.policy_version)
        times.publish_s += time.monotonic() - began

    async def _publish_before_all(self) -> None:
        """Announced before a batch is assembled: tokens of a version that the broker does not know
        count as stale."""
        await self._publish_if_new(StepTimes())
        await self._publisher.settle()

    def _behind(self) -> bool:
        """Whether the journal still holds batches that are not in the weights."""
        entries = self._journal.entries
        return bool(entries) and entries[-1].offset >= self.state.journal_offset

    def _meta(self) -> CheckpointMeta:
        return self.state.meta(self._config.run.name, self._fence.token, self._journal.life)

    async def _report(self, done: TrainedStep) -> None:
        metrics = step_metrics(done, self._config.loss, self.state.policy_version)
        metrics.update(self._speed.metrics(done.batch, done.times.train_s))
        metrics["arithmetic"] = self._arithmetic
        norm = self._spikes.judge(done.result.grad_norm)
        metrics["grad_norm_spike"], metrics["grad_norm_median"] = int(norm.is_spike), norm.median
        metrics["announce_s"] = round(self._publisher.announce_s, 6)
        metrics["checkpoint_step"] = self._checkpointer.written_step
        metrics["checkpoints_failed"] = self._checkpointer.failures
        if self._on_step is not None:
            self._on_step(metrics)
        await self._broker.push_metrics("learner", metrics)
        log_step(self._log, metrics)

    # Waiting

    def _stall_since(self) -> float:
        return time.monotonic() - self._stall.waited_s

    async def _wait(self, awaited: str) -> None:
        self._publisher.check()
        await self._stall.waiting(
            awaited, ready_tokens=self._batcher.ready_tokens, paused=self._keeper.poll.paused
        )
        await self._shutdown.sleep(_POLL_S)

    def _status(self, doing: str) -> None:
        self._keeper.status = {
            "doing": doing,
            "step": self.state.step,
            "steps": self._config.learner.steps,
            "policy_version": self.state.policy_version,
            "carried": len(self.state.carry),
        }
