"""The rollout worker: takes leases, generates, sends tokens, takes up weights in mid-rollout."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from ringasync.broker.client import Broker
from ringasync.broker.types import Lease, Poll
from ringasync.config.schema import Config
from ringasync.errors import EngineError, SessionLostError, SwapFailedError
from ringasync.observability.log import get_logger
from ringasync.records.states import Phase
from ringasync.runtime import crashpoints
from ringasync.runtime.shutdown import Shutdown
from ringasync.weights.canary import ProbeGate
from ringasync.weights.transport import Transport
from workers.buffers import RolloutStore
from workers.device_turn import DeviceTurn
from workers.engine_control import EngineControl, MakeEngine
from workers.engines.base import TokenChunk
from workers.flusher import Flusher
from workers.intake import ModelLimits, TakePause, sort_leases
from workers.session import SessionKeeper, Status
from workers.tasks import first_end
from workers.throttle import Throttle
from workers.throughput import Throughput
from workers.watch import WorkerWatch
from workers.weight_keeper import WeightKeeper

ReadLimits = Callable[[Path], ModelLimits]
"""What a weights folder says of EOS, vocabulary and window."""

Companion = Callable[[asyncio.Event], Coroutine[Any, Any, None]]
"""Work beside generation under the same session (the grader); runs until the event is set."""

_TICK_S = 0.1
_REBUILD_WINDOW_S = 60.0
"""An engine that dies twice within this is not rebuilt again."""

log = get_logger()


class RolloutWorker:
    """One worker's life.

    Consumes: leases, weight versions, polls. Produces: segments, finished and parked rollouts.
    Waits for: a published version, then work, weights, or a poll that says otherwise; what it
    waits for is in its status. Ended by: a request to stop, the run's end, or an error.
    """

    def __init__(
        self,
        config: Config,
        broker: Broker,
        transport: Transport,
        make_engine: MakeEngine,
        read_limits: ReadLimits,
        shutdown: Shutdown,
        *,
        worker_id: str,
        scratch_dir: Path,
        info: dict[str, str] | None = None,
        more_status: Callable[[], Status] = dict,
        companion: Companion | None = None,
    ) -> None:
        worker, weights = config.worker, config.weights
        self._config, self._broker, self._shutdown = config, broker, shutdown
        self._read_limits, self._more_status = read_limits, more_status
        self._companion = companion
        self._companion_stop = asyncio.Event()
        self._companion_task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._to_abort: list[str] = []
        self._doing = "starting"
        self._take_pause = TakePause()
        self.is_drained = False
        """Whether every lease was handed back; False when ``drain_timeout_s`` ran out first."""
        self._last_rebuild_s: float | None = None
        self._limits: ModelLimits | None = None
        self._throughput = Throughput()
        self.store = RolloutStore()
        self.control = EngineControl(make_engine, self._on_tokens, self._changed)
        self._throttle = Throttle(self.control, self.store, worker.flush_tokens)
        self.session = SessionKeeper(
            broker,
            worker_id,
            ttl_ms=worker.session_ttl_ms,
            heartbeat_ms=worker.heartbeat_ms,
            info=info or {},
            status=WorkerWatch(config.observability.stall_report_s).watched(self.status),
            changed=self._changed,
        )
        self.device = DeviceTurn(self.control, self.session.beat)
        self.flusher = Flusher(
            broker,
            self.store,
            lambda: self.session.session_id,
            flush_tokens=worker.flush_tokens,
            flush_ms=worker.flush_ms,
            on_lost=self._on_lost,
            on_progress=self._on_progress,
        )
        self.weights = WeightKeeper(
            broker,
            transport,
            self.control,
            self.store,
            ProbeGate(*config.probe_floors),
            scratch_dir,
            use_canary=weights.canary,
            report_bad=self._report_bad,
            changed=self._changed,
        )

    async def run(self) -> str:
        """Work until told to stop or until the run is done; returns why it ended.

        All leases are parked and the session is closed when it returns, within
        ``worker.drain_timeout_s``. Raises ``EngineError`` when the engine cannot be kept alive,
        broker errors when Redis is gone for good.
        """
        await self.session.open()
        main = asyncio.create_task(self._work(), name="work")
        overdue = asyncio.create_task(self._drain_deadline(), name="drain-deadline")
        helpers = [
            overdue,
            asyncio.create_task(self.session.run(), name="heartbeat"),
            asyncio.create_task(self.flusher.run(), name="flush"),
            asyncio.create_task(self._throttle.run(), name="throttle"),
        ]
        if self._companion is not None:
            self._companion_task = asyncio.create_task(
                self._companion(self._companion_stop), name="companion"
            )
            helpers.append(self._companion_task)
        try:
            await first_end((main, overdue), helpers)
            return main.result() if main.done() else "stopped, not drained in time"
        finally:
            for task in (main, *helpers):
                task.cancel()
            await asyncio.gather(main, *helpers, return_exceptions=True)
            await self.control.stop()
            await self.weights.close()

    def status(self) -> Status:
        """What ``top`` shows of this worker."""
        held_by = self.control.held_by
        return {
            "doing": f"{self._doing} (engine paused: {held_by})" if held_by else self._doing,
            "active": self.store.active,
            "leases": len(self.store),
            "tokens_generated": self._throughput.tokens,
            "tokens_per_s": round(self._throughput.tokens_per_s(), 1),
            "policy_version": self.weights.loaded_number,
            "held_tokens": self.store.held_tokens,
            "unsent_tokens": sum(rollout.unsent_tokens for rollout in self.store),
            **self.weights.figures,
            "finished": self.flusher.finished,
            "parked": self.flusher.parked,
            **{**self.control.figures, **self.device.status, **self._more_status()},
        }

    # The main task.

    async def _work(self) -> str:
        """Tick until there is a reason to end, then hand everything back."""
        try:
            while not (why := self._why_end()):
                self._changed.clear()
                try:
                    await self._tick(self.session.poll)
                except EngineError as error:
                    self.control.fail(error)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_TICK_S):
                        await self._changed.wait()
        except _GiveUpError as error:
            await self.session.close()
            raise EngineError(str(error)) from error
        await self._drain(why)
        return why

    def _why_end(self) -> str:
        if self._shutdown.is_requested:
            return f"stopped by {self._shutdown.reason or 'request'}"
        return "run is done" if self.session.poll.phase == Phase.DONE else ""

    async def _tick(self, poll: Poll) -> None:
        """Look at everything once, most urgent first."""
        if self.session.lost:
            await self._renew_session()
            return
        learners_turn = self.device.is_learners(poll)
        if self.control.failed is not None and not learners_turn:
            await self._rebuild(self.control.failed)
        await self._drop_lost()
        await self._follow_pause(poll)
        if poll.round_state == "closing":
            await self._park("round closed", "train")
        if learners_turn:
            self._doing = "asleep: the learner has the device"
            await self.device.sleep()
            return
        await self._follow_weights(poll)
        if self.device.is_asleep and (poll.paused or self.weights.wanted(poll) is None):
            await self.device.wake()
        if self.control.is_running and not self.device.is_asleep:
            await self._take(poll)

    async def _renew_session(self) -> None:
        """Everything leased belongs to others now: drop it and begin anew."""
        lost = [rollout.rollout_id for rollout in self.store]
        for rollout_id in lost:
            self.store.remove(rollout_id)
        await self.control.abort(lost)
        await self.session.open()
        log.warning("new session", session=self.session.session_id, dropped_rollouts=len(lost))

    async def _drop_lost(self) -> None:
        """Stop generating what the flusher found to be no longer ours."""
        ids, self._to_abort = self._to_abort, []
        await self.control.abort(ids)

    async def _follow_pause(self, poll: Poll) -> None:
        if poll.paused:
            await self.control.hold("run paused")
            await self.flusher.flush(everything=True)
        else:
            await self.control.release("run paused")

    # Weights.

    async def _follow_weights(self, poll: Poll) -> None:
        number = self.weights.wanted(poll)
        if number is None or (poll.paused and self.weights.loaded is not None):
            if self.weights.loaded is None:
                self._doing = "waiting for a policy version that may be loaded"
            return
        version = await self.weights.fetched(number)
        if version is None:
            if self.weights.loaded is None:
                self._doing = f"fetching version {number}"
            return
        try:
            if self.weights.loaded is None:
                self._doing = f"loading version {number}"
                self._limits = self._read_limits(version.folder)
                await self.weights.start(version)
            else:
                # A rollout of an evaluation has one version; whoever has it loaded goes on.
                await self._park("weights move on", "eval")
                self._doing = f"taking up version {number}"
                await self.weights.swap(version, self.flusher.wake)
        except SwapFailedError as error:
            await self._give_up_version(error)
        self.flusher.wake()

    async def _give_up_version(self, error: SwapFailedError) -> None:
        """Drop what the version sampled, report it, hand all rollouts back, rebuild the engine."""
        await self.weights.refuse(error.version, error.why)
        await self._park(f"version {error.version} failed its canary")
        await self.weights.restart()

    async def _report_bad(self, version: int, why: str) -> None:
        count = await self._broker.report_bad_version(self.session.session_id, version, why)
        log.warning("bad version reported", version=version, workers=count)

    async def _rebuild(self, error: EngineError) -> None:
        """Hand everything back and start another engine; raises ``error`` the second time."""
        now_s, last_s = time.monotonic(), self._last_rebuild_s
        self._last_rebuild_s = now_s
        self._doing = "rebuilding the engine"
        # "error" first: without progress it counts as an attempt, so that a rollout which kills
        # engines is quarantined in the end.
        await self._park(f"error: the engine of {self.session.session_id} failed")
        if last_s is not None and now_s - last_s < _REBUILD_WINDOW_S:
            raise _GiveUpError(f"the engine failed again after it was rebuilt: {error}") from error
        try:
            await self.weights.restart()
        except EngineError as again:
            raise _GiveUpError(f"the engine failed and cannot be rebuilt: {again}") from error

    # Work.

    async def _take(self, poll: Poll) -> None:
        limit = self._config.worker.max_concurrent
        # A place is free as soon as its rollout ended; the last tokens may still be on their way.
        room = min(limit - self.store.active, 2 * limit - len(self.store))
        self._doing = "generating" if len(self.store) else "waiting for work"
        if poll.paused:
            self._doing = "waiting: the run is paused"
        elif self.flusher.full_since_s is not None:
            self._doing = "waiting: Redis is full"
        elif room > 0 and self._take_pause.is_over(poll, self.weights.loaded_number):
            try:
                leases = await self._broker.take(
                    self.session.session_id, room, self.weights.loaded_number
                )
            except SessionLostError:
                self.session.mark_lost()
                return
            self._take_pause.note(len(leases))
            await self._accept(leases)

    async def _accept(self, leases: Sequence[Lease]) -> None:
        if not leases or self._limits is None:
            return
        # The flusher may have given one of them up meanwhile: the engine must drop it first.
        self._to_abort += self.store.drop_superseded(leases)
        await self._drop_lost()
        intake = sort_leases(leases, self._limits)
        for rollout in (*intake.done, *intake.generate):
            self.store.put(rollout)
        if intake.done:
            self.flusher.wake()
        if intake.bad:
            for lease, reason in intake.bad:
                log.warning("rollout quarantined", rollout=lease.rollout_id, reason=reason)
            await self._broker.quarantine_many(
                self.session.session_id,
                [(lease.rollout_id, lease.token, reason) for lease, reason in intake.bad],
            )
        window = self._limits.window_tokens
        await self.control.submit([rollout.request(window) for rollout in intake.generate])
        crashpoints.reach("taken")
        self._doing = "generating"

    async def _park(self, why: str, kind: str = "") -> None:
        """Hand rollouts back with every token that may be sent; held tokens are dropped.

        Returns when the broker has them; while Redis is full it waits and tries again.
        """
        chosen = [r for r in self.store if r.lease.kind == (kind or r.lease.kind) and not r.leaving]
        if not chosen:
            return
        with contextlib.suppress(EngineError):
            await self.control.hold("parking")
        await self.control.abort([r.rollout_id for r in chosen if r.finish is None])
        held_version = self.store.held_version
        for rollout in chosen:
            if held_version is not None:
                rollout.drop_version(held_version)
            if rollout.finish is None:
                rollout.leaving = why
        with contextlib.suppress(EngineError):
            await self.control.release("parking")
        self._doing = f"parking {len(chosen)} rollouts: {why}"
        log.info("parking rollouts", rollouts=len(chosen), why=why)
        while not self.session.lost:
            await self.flusher.flush(everything=True)
            if not any(rollout.rollout_id in self.store for rollout in chosen):
                return
            await asyncio.sleep(_TICK_S)

    async def _drain(self, why: str) -> None:
        """Park everything, let the companion end, close the session."""
        self._doing = f"draining: {why}"
        self._companion_stop.set()
        await self._park(why)
        if self._companion_task is not None:
            await asyncio.wait([self._companion_task])
        await self.session.close()
        self.is_drained = True

    async def _drain_deadline(self) -> None:
        """Ends ``drain_timeout_s`` after a stop was asked for, whatever holds the drain up."""
        await self._shutdown.requested.wait()
        await asyncio.sleep(self._config.worker.drain_timeout_s)
        log.warning("not drained in time; the coordinator returns what is left")

    # Called from other tasks; must not wait.

    def _on_tokens(self, chunks: Sequence[TokenChunk]) -> None:
        self._throughput.add(self.store.absorb(chunks))
        ended = any(chunk.finish is not None for chunk in chunks)
        if ended:
            self._changed.set()
        if ended or self.store.most_unsent_tokens() >= self._config.worker.flush_tokens:
            self.flusher.wake()
            self._throttle.check()

    def _on_lost(self, rollout_ids: Sequence[str]) -> None:
        self._to_abort.extend(rollout_ids)
        self._changed.set()

    def _on_progress(self) -> None:
        """The flusher sent or let go of something: there is room again."""
        self._throttle.check()
        self._changed.set()


class _GiveUpError(Exception):
    """The engine cannot be kept alive; becomes an ``EngineError`` at the top."""
