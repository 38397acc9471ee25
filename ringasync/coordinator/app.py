"""Wires the coordinator's loops; the first that fails ends them all."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ringasync.broker.client import Broker
from ringasync.config.load import config_hash, resolved_json
from ringasync.config.schema import Config
from ringasync.coordinator.director import Director
from ringasync.coordinator.evaluation import Evaluator
from ringasync.coordinator.exported import note_line
from ringasync.coordinator.feeder import Feeder
from ringasync.coordinator.pipelined import PipelinedSchedule
from ringasync.coordinator.prompts import PromptSource, load_encoder
from ringasync.coordinator.reaper import Reaper
from ringasync.coordinator.recorder import Recorder
from ringasync.coordinator.rounds_loop import RoundsSchedule
from ringasync.coordinator.seat import Seat
from ringasync.coordinator.summary import build_summary, write_summary
from ringasync.coordinator.tracer import LifeTracer, make_tracer
from ringasync.coordinator.watchdog import Watchdog
from ringasync.errors import EnvironmentRefusedError, RingError
from ringasync.observability.exporter import Exporter, exporting
from ringasync.observability.log import get_logger
from ringasync.records.states import Phase
from ringasync.runtime.joining import connected
from ringasync.runtime.shutdown import Shutdown

_LEAVE_TIMEOUT_S = 5.0

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Where the broker and the starting model are."""

    redis_url: str
    model: str


MakeSource = Callable[[Config, str], PromptSource]


def make_source(config: Config, model: str) -> PromptSource:
    """The run's prompts with the model's tokenizer. Blocking."""
    from ringasync.tasks.mixture import build_mixture

    encode = load_encoder(model, config.data.template)
    train = build_mixture(config.data, config.run.seed)
    held_out = build_mixture(config.data, config.eval.seed)
    return PromptSource(config, train, held_out, encode)


class Coordinator:
    """One coordinator process. ``source`` may be given by tests; else it is made of the config."""

    def __init__(
        self,
        config: Config,
        place: Place,
        shutdown: Shutdown,
        *,
        source: MakeSource = make_source,
    ) -> None:
        self._config, self._place, self._shutdown = config, place, shutdown
        self._make_source = source

    async def run(self) -> int:
        """Coordinate until the run is done or a stop is asked for; the exit code.

        Raises:
            RingError: something stands in the way, or the role has passed to another process.
        """
        config = self._config
        async with (
            connected(config, self._place.redis_url) as broker,
            exporting(config, "coordinator") as exporter,
        ):
            source = await asyncio.to_thread(self._make_source, self._config, self._place.model)
            while not self._shutdown.is_requested:
                if await self._hold_seat(broker, source, exporter):
                    break
            return 0

    async def _hold_seat(self, broker: Broker, source: PromptSource, exporter: Exporter) -> bool:
        """Take the seat and serve; False when Redis came back empty and it must begin again."""
        config_json, digest = resolved_json(self._config), config_hash(self._config)
        new = await broker.create_run(config_json, digest, self._config.schedule.mode)
        seat = Seat(broker, self._config, self._shutdown, exporter.health.say)
        if not await seat.take():
            return True
        log.info("coordinator begins", new_run=new, fence=seat.fence.token, config_hash=digest)
        try:
            await self._serve(seat, source, exporter)
        except RingError as error:
            if isinstance(error, EnvironmentRefusedError) or await _run_exists(broker):
                raise
            log.warning("redis came back empty: taking the seat again")
            return False
        await _leave(seat)
        return True

    async def _serve(self, seat: Seat, source: PromptSource, exporter: Exporter) -> None:
        await seat.beat()
        if seat.poll.phase == Phase.DONE:
            log.info("the run is done already")
            return
        tracer = make_tracer(seat)
        recorder = Recorder(seat, partial(note_line, exporter))
        recorder.open()
        try:
            director = await self._build(seat, source, recorder)
            done = await self._run_loops(seat, recorder, director, tracer)
            await recorder.finish(seat.poll.learner_step if done else 0)
            if tracer is not None:
                await tracer.trace()
            if done:
                await self._finish_run(seat, recorder)
        finally:
            recorder.close()
            if tracer is not None:
                tracer.close()

    async def _build(self, seat: Seat, source: PromptSource, recorder: Recorder) -> Director:
        feeder = Feeder(seat, source)
        await feeder.restore()
        schedule: PipelinedSchedule | RoundsSchedule
        if self._config.schedule.mode == "rounds":
            schedule = RoundsSchedule(seat, feeder)
        else:
            schedule = PipelinedSchedule(seat, feeder, list(recorder.history.recent_lengths))
            recorder.listen(schedule.on_outcome)
        return Director(seat, feeder, Evaluator(seat, source, recorder), schedule, Watchdog(seat))

    async def _run_loops(
        self, seat: Seat, recorder: Recorder, director: Director, tracer: LifeTracer | None
    ) -> bool:
        """All loops until the run is done (True) or a stop is asked for (False)."""

        async def stop_on_request() -> None:
            await self._shutdown.requested.wait()
            log.info("stopping", why=self._shutdown.reason)
            seat.stop.set()

        async def direct() -> bool:
            done = await director.run()
            seat.stop.set()
            return done

        try:
            async with asyncio.TaskGroup() as group:
                watcher = group.create_task(stop_on_request(), name="shutdown")
                group.create_task(seat.keep(), name="seat")
                group.create_task(recorder.run(), name="recorder")
                group.create_task(Reaper(seat).run(), name="reaper")
                if tracer is not None:
                    group.create_task(tracer.run(), name="tracer")
                directing = group.create_task(direct(), name="director")
                await directing
                watcher.cancel()
        except BaseExceptionGroup as failures:
            raise _first_cause(failures) from failures
        return directing.result()

    async def _finish_run(self, seat: Seat, recorder: Recorder) -> None:
        """Summary and report first: ``done`` makes every role exit and the supervisor with them."""
        poll = await seat.beat()
        summary = build_summary(
            self._config.run.name,
            recorder.history,
            await seat.broker.audit(),
            steps=poll.learner_step,
            latest_version=poll.latest_version,
            now_ms=int(time.time() * 1000),
        )
        path = write_summary(seat.run_dir, summary)
        await self._write_report(seat)
        await seat.broker.set_phase(seat.fence, Phase.DONE)
        log.info("run done", summary=str(path), steps=summary["steps"])

    async def _write_report(self, seat: Seat) -> None:
        writing = asyncio.create_task(asyncio.to_thread(_report_of, seat.run_dir))
        while not writing.done():  # plotting takes a while: the lock must not expire meanwhile
            await asyncio.wait({writing}, timeout=seat.ttl_ms / 3000)
            await seat.beat()
        try:
            log.info("report written", path=str(writing.result()))
        except Exception:
            # The run is done and its numbers are safe; `ringasync report` can try again.
            log.exception("no report could be written", remedy="ringasync report RUN")


def _report_of(run_dir: Path) -> Path:
    """In the thread, the import too: it takes a second, and fails where a package is damaged."""
    from ringasync.observability.report import write_report

    return write_report(run_dir)


async def _run_exists(broker: Broker) -> bool:
    try:
        await broker.run_meta()
    except RingError:
        return False
    return True


async def _leave(seat: Seat) -> None:
    try:
        async with asyncio.timeout(_LEAVE_TIMEOUT_S):
            await seat.leave()
    except (TimeoutError, RingError) as error:
        log.warning("the seat could not be given back and will expire", why=str(error))


def _first_cause(failures: BaseExceptionGroup[Any]) -> BaseException:
    """The one failure to report: our own errors before others, the first before the rest."""
    flat: list[BaseException] = []
    pending: list[BaseException] = [failures]
    while pending:
        each = pending.pop(0)
        if isinstance(each, BaseExceptionGroup):
            pending = [*each.exceptions, *pending]
        else:
            flat.append(each)
    return next((each for each in flat if isinstance(each, RingError)), flat[0])
