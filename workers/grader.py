"""The grader: finished rollouts become graded ones, or errors that are tried again.

Runs inside a rollout worker (``grader.in_worker``) under that worker's session, or as a role of its
own: ``python -m workers.grader CONFIG``.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from ringasync.broker.client import Broker
from ringasync.broker.types import GradeJob, Verdict
from ringasync.config.schema import Config
from ringasync.errors import (
    BrokerUnreachableError,
    EnvironmentRefusedError,
    SchemaError,
    SessionLostError,
    VerifierError,
)
from ringasync.observability.exporter import Exporter, exporting
from ringasync.observability.log import bind_identity, configure_logging, get_logger
from ringasync.records.segment import decode_segment
from ringasync.records.states import Phase
from ringasync.records.trajectory import join_segments
from ringasync.rewards.pool import VerifierPool
from ringasync.runtime.joining import connected, join_when_created
from ringasync.runtime.role import RoleArgs, parse_role, run_role
from ringasync.runtime.shutdown import Shutdown
from workers.verdict_watch import VerdictWatch

Decode = Callable[[Sequence[int]], str]
"""Token ids of a response to text, special tokens left out."""

JOBS_PER_PROCESS = 4
"""Jobs taken ahead, so that no verifier process waits for Redis."""

SAMPLE_CHARS = 16_384
_IDLE_MIN_S, _IDLE_MAX_S = 0.01, 0.2

log = get_logger()


def tokenizer_decoder(model: str) -> Decode:
    """A decoder with the model's tokenizer, loaded when first used (transformers takes seconds)."""

    @cache
    def tokenizer() -> Any:
        from transformers import AutoTokenizer  # heavy, and not always needed

        return AutoTokenizer.from_pretrained(model)

    lock = threading.Lock()

    def decode(token_ids: Sequence[int]) -> str:
        with lock:  # called from threads, and a fast tokenizer is not made for two at once
            return str(tokenizer().decode(list(token_ids), skip_special_tokens=True))

    return decode


def _check_isolation(pool: VerifierPool, config: Config) -> None:
    """Raises ``EnvironmentRefusedError`` for a task that would only ever give errors here."""
    verifiers = {task.verifier for task in config.data.tasks}
    for verifier in sorted(verifiers):
        if (refusal := pool.refusal(verifier)) is not None:
            raise EnvironmentRefusedError(refusal)
    if pool.not_isolated and config.grader.isolation != "off":
        log.warning("verifiers_not_isolated", reason=pool.not_isolated, see="docs/sandbox.md")


class Grader:
    """Takes grading jobs, asks verifiers, stores verdicts; one for each session.

    ``session_id`` is asked before each call to the broker: the owner may open a new session at any
    time. Jobs of a lost session return to the queue by themselves, their verdicts are refused.
    """

    def __init__(
        self, broker: Broker, config: Config, decode: Decode, session_id: Callable[[], str]
    ) -> None:
        self._broker, self._config, self._decode = broker, config, decode
        self._session_id = session_id
        grader = config.grader
        self._pool = VerifierPool(
            grader.processes,
            grader.timeout_s,
            grader.memory_bytes,
            isolation=grader.isolation,
            readable=grader.readable,
        )
        _check_isolation(self._pool, config)
        self._limit = grader.processes * JOBS_PER_PROCESS
        self._tasks: set[asyncio.Task[Verdict | None]] = set()
        self._unsent: list[Verdict] = []
        self._watch = VerdictWatch(config.observability.stall_report_s)
        self._lost_session = ""
        self._num_lost = 0

    async def run(self, stop: asyncio.Event) -> None:
        """Grade until ``stop``, then finish what was taken.

        Consumes: grading jobs. Produces: verdicts, at least once; the broker's tokens make repeats
        harmless. Waits for: a job, a verdict, or ``stop``; jobs are polled every 10 to 200 ms.
        Unblocked by: every verifier's time limit. Raises what the broker raises, except
        ``SessionLostError``: then it waits until the owner has a new session.
        """
        stopped = asyncio.create_task(stop.wait())
        idle_s = _IDLE_MIN_S
        try:
            while not (stop.is_set() and not self._tasks and not self._unsent):
                taken = 0 if stop.is_set() else await self._take()
                idle_s = _IDLE_MIN_S if taken or self._tasks else min(2 * idle_s, _IDLE_MAX_S)
                waited: set[asyncio.Task[Any]] = {*self._tasks}
                if not stop.is_set():
                    waited.add(stopped)
                await _first_of(waited, idle_s)
                await self._send(self._collect())
                _obey_cancellation()
        finally:
            stopped.cancel()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(stopped, *self._tasks, return_exceptions=True)
            await self._pool.close()

    def status(self) -> dict[str, int | float | str]:
        """For the heartbeat: verdicts and errors so far, jobs in hand, verdict times, hung ones."""
        stats = self._pool.stats
        return {
            "grade_jobs": len(self._tasks),
            "grade_verdicts": stats.verdicts,
            "grade_errors": stats.errors,
            "grade_kills": stats.kills,
            "lost_sessions": self._num_lost,
            "verdict_total_s": round(stats.verify_s, 6),
            "verdict_mean_s": round(stats.verify_s / max(1, stats.verdicts), 6),
            "verdict_max_s": round(stats.verify_max_s, 6),
            "stall": self._watch.stall(),
        }

    async def _take(self) -> int:
        session_id = self._session_id()
        free = self._limit - len(self._tasks) - len(self._unsent)
        if free <= 0 or not session_id or session_id == self._lost_session:
            return 0
        try:
            jobs = await self._broker.take_grading(session_id, free)
        except SessionLostError:
            self._lost_session = session_id
            self._num_lost += 1
            return 0
        self._tasks.update(asyncio.create_task(self._grade(job)) for job in jobs)
        return len(jobs)

    async def _grade(self, job: GradeJob) -> Verdict | None:
        """One job's verdict; None when its record is broken and was quarantined."""
        try:
            if job.unreadable:
                raise SchemaError(job.unreadable)
            tokens = join_segments([decode_segment(raw) for raw in job.segments]).token_ids
        except SchemaError as error:
            log.warning("broken record quarantined", rollout=job.rollout_id, why=str(error))
            with suppress(SessionLostError):
                await self._broker.quarantine_many(
                    self._session_id(), [(job.rollout_id, job.token, f"grader: {error}")]
                )
            return None
        decoded = await asyncio.to_thread(self._decode, tokens.tolist())
        response = decoded.encode("utf-8", "replace").decode()  # Redis takes no lone surrogates
        shown = response[:SAMPLE_CHARS]
        try:
            with self._watch.asking(job.rollout_id, job.task):
                reward = await self._pool.verify(job.task, response)
        except VerifierError as error:
            log.warning("no verdict", rollout=job.rollout_id, attempts=job.attempts, why=str(error))
            return Verdict(
                job.rollout_id, job.token, None, f"{type(error).__name__}: {error}", shown
            )
        return Verdict(job.rollout_id, job.token, reward, text=shown)

    def _collect(self) -> list[Verdict]:
        """Verdicts that are there, those that Redis could not take before included."""
        done = {task for task in self._tasks if task.done()}
        self._tasks -= done
        verdicts, self._unsent = self._unsent, []
        return verdicts + [verdict for task in done if (verdict := task.result()) is not None]

    async def _send(self, verdicts: list[Verdict]) -> None:
        if not verdicts:
            return
        try:
            statuses = await self._broker.grade_many(
                self._session_id(),
                verdicts,
                self._config.grader.max_attempts,
                self._config.schedule.filter_zero_variance,
                self._config.observability.samples_keep,
            )
        except SessionLostError:
            return
        for verdict, status in zip(verdicts, statuses, strict=True):
            if status == "full":
                self._unsent.append(verdict)
            elif status != "ok":
                log.debug("verdict came too late", rollout=verdict.rollout_id, status=status)


async def _first_of(tasks: set[asyncio.Task[Any]], timeout_s: float) -> None:
    if tasks:
        await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    else:
        await asyncio.sleep(timeout_s)


def _obey_cancellation() -> None:
    """On Python 3.11 redis-py may swallow a cancellation (``asyncio.wait_for``): raise it again."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


class GraderRole:
    """A grader with a session of its own, for ``python -m workers.grader``."""

    def __init__(self, broker: Broker, args: RoleArgs, name: str, exporter: Exporter) -> None:
        self._broker, self._config, self._name = broker, args.config, name
        self._exporter = exporter
        self._session_id = ""
        self._done = asyncio.Event()
        self._grader = Grader(
            broker, args.config, tokenizer_decoder(args.model), lambda: self._session_id
        )

    async def run(self, stop: asyncio.Event) -> None:
        """Grade until ``stop`` or until the run is done; then hand back what is left.

        Consumes: grading jobs and the run's phase. Produces: verdicts and heartbeats. Waits for:
        both loops. Unblocked by: ``stop``, the phase ``done``, or the first loop that fails.
        """
        await self._open_session()
        loops = [
            asyncio.create_task(self._grader.run(self._done)),
            asyncio.create_task(self._beat()),
        ]
        relay = asyncio.create_task(self._relay(stop))
        try:
            done, _ = await asyncio.wait(loops, return_when=asyncio.FIRST_COMPLETED)
            for loop in done:
                loop.result()
        finally:
            for task in (relay, *loops):
                task.cancel()
            await asyncio.gather(relay, *loops, return_exceptions=True)
            with suppress(SessionLostError, BrokerUnreachableError):
                await self._broker.close_session(self._session_id)

    async def _relay(self, stop: asyncio.Event) -> None:
        waits = [asyncio.create_task(event.wait()) for event in (stop, self._done)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        self._done.set()

    async def _open_session(self) -> None:
        session_id = f"{self._name}-{secrets.token_hex(2)}"
        info = {"worker": self._name, "host": socket.gethostname(), "pid": str(os.getpid())}
        ttl_ms = self._config.worker.session_ttl_ms
        await self._broker.open_session(session_id, "grader", ttl_ms, info)
        self._session_id = session_id

    async def _beat(self) -> None:
        """Consumes: the poll. Produces: heartbeats. Waits for: its interval, until cancelled."""
        worker = self._config.worker
        while True:
            figures = self._grader.status()
            doing = "grading" if figures["grade_jobs"] else "waiting for finished rollouts"
            status = {"doing": doing, **figures}
            self._exporter.set(status)
            poll = await self._broker.heartbeat(self._session_id, worker.session_ttl_ms, status)
            if not poll.alive:
                log.warning("session lost, opening another", session=self._session_id)
                await self._open_session()
            if poll.phase == Phase.DONE:
                self._done.set()
            _obey_cancellation()
            await asyncio.sleep(worker.heartbeat_ms / 1000)


async def grade_role(args: RoleArgs, shutdown: Shutdown) -> int:
    """The role's body: join the run, grade, leave. Returns the exit code."""
    config = args.config
    name = f"grader-{socket.gethostname()}-{os.getpid()}"
    configure_logging("grader", config.run.name, config.run_dir, config.observability.log_level)
    bind_identity(worker=name)
    async with connected(config, args.redis_url) as broker:
        if await join_when_created(broker, config, shutdown):
            log.info("grading", processes=config.grader.processes)
            async with exporting(config, "grader", name) as exporter:
                await GraderRole(broker, args, name, exporter).run(shutdown.requested)
    return 0


def main() -> int:
    """Command line of the grader role."""
    args = parse_role("python -m workers.grader", "Scores finished rollouts of a run.")
    return run_role(lambda shutdown: grade_role(args, shutdown))


if __name__ == "__main__":
    raise SystemExit(main())
