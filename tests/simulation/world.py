"""One simulated run: the production roles in one process, under a schedule of faults."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from structlog.testing import capture_logs

import learner.app
import learner.keeper
import learner.loop
import ringasync.coordinator.app
import ringasync.coordinator.seat
import workers.grader
from learner.app import LearnerOptions, run_learner
from ringasync.broker.client import Broker
from ringasync.broker.keys import Keys
from ringasync.config.schema import Config
from ringasync.coordinator.app import Coordinator, Place
from ringasync.coordinator.seat import Seat
from ringasync.errors import EnvironmentRefusedError, InvariantError, JournalError, RingError
from ringasync.runtime.joining import join_when_created
from ringasync.runtime.role import RoleArgs
from ringasync.runtime.shutdown import Shutdown
from ringasync.weights.file_transport import FileTransport
from tests.coordinator.crew import make_config, words_source
from workers.engines.base import Engine, SamplingParams
from workers.engines.scripted import ScriptedEngine
from workers.grader import Grader
from workers.intake import ModelLimits
from workers.rollout_loop import RolloutWorker

from .schedule import Schedule
from .stand_ins import CountingBackend, HashVerifier
from .virtual import NumberedTask, VirtualLoop, virtual_process
from .watch import ViolationError, Watch
from .wire import Life, SimRedis, Step, Wire

PROMPTS = 8
GROUP_SIZE = 3
MAX_NEW_TOKENS = 8
BUDGET_TOKENS = 24
MAX_STALENESS = 2
GATE_SLACK = 1.25
"""The gate goes by estimated lengths of what is unfinished."""
EOS = (3, 7, 11, 19)
TTL_MS = 600
TOKEN_S = 0.02
LIMIT_S = 120.0
"""A run that takes longer by the virtual clock does not end."""
HOPELESS = (EnvironmentRefusedError, InvariantError, JournalError)
"""Errors after which a supervisor does not start a role again, and those that must never be."""

RUN = "sim"
_life: ContextVar[Life] = ContextVar("life")


def run_config(folder: Path, mode: str) -> Config:
    """A short run with small everything."""
    return make_config(
        folder,
        RUN,
        worker__heartbeat_ms=150,
        worker__session_ttl_ms=TTL_MS,
        worker__flush_tokens=2,
        worker__flush_ms=40,
        worker__max_concurrent=6,
        schedule__mode=mode,
        schedule__group_size=GROUP_SIZE,
        schedule__budget_tokens=BUDGET_TOKENS,
        schedule__max_staleness=MAX_STALENESS,
        schedule__filter_zero_variance=True,
        schedule__quarantine_breaker=1.0,
        schedule__max_attempts=50,
        schedule__retention_max=None,
        sampling__max_new_tokens=MAX_NEW_TOKENS,
        learner__steps=1000,
        learner__lock_ttl_ms=TTL_MS,
        learner__checkpoint_every_steps=2,
        weights__probe_sequences=1,
        eval__prompts=0,
    )


class Simulation:
    """Starts the roles, kills and restarts them, and waits for the end of the run."""

    def __init__(self, server: redis.Redis, schedule: Schedule, folder: Path) -> None:
        self.schedule = schedule
        self.config = run_config(folder, schedule.mode)
        self.loop = VirtualLoop()
        self.keys = Keys(RUN)
        self.wire = Wire(self.loop, server, schedule, self.keys, self.crash)
        limit = GATE_SLACK * (MAX_STALENESS + 1) * BUDGET_TOKENS
        self.watch = Watch(
            self.wire,
            self.config.run_dir / "journal",
            RUN,
            limit if schedule.mode == "pipelined" else float("inf"),
        )
        self.loop.on_thread = lambda func, args, torch: self.wire.thread(
            _life.get(), func, args, torch
        )
        self.loop.on_task = self._adopt
        self.lives: dict[str, Life] = {}
        self.restarts = 0
        self.logs: list[Any] = []
        self.backend = CountingBackend()
        self.transports: dict[str, FileTransport] = {}
        self._roles: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
            "coordinator": self._coordinate,
            "learner": self._learn,
            "worker1": lambda: self._work("w1"),
            "worker2": lambda: self._work("w2"),
        }
        self._left: set[str] = set()
        self._ended: asyncio.Future[None] = self.loop.create_future()

    def run(self) -> None:
        """Drive the run to its end. Raises ``ViolationError``, or what a role must not raise."""
        with self._in_the_place_of_processes():
            try:
                self.loop.run_until_complete(self._run())
            finally:
                self._end_all()

    async def _run(self) -> None:
        for role in self._roles:
            self.start(role)
        self.loop.call_at(LIMIT_S, self._too_long)
        await self._ended

    def _too_long(self) -> None:
        missing = sorted(self._roles.keys() - self._left)
        self.fail(ViolationError(f"the run did not end in {LIMIT_S:g} virtual s: {missing} remain"))

    def fail(self, error: BaseException) -> None:
        """End the run with this error."""
        if not self._ended.done():
            self._ended.set_exception(error)

    # Processes

    def start(self, role: str) -> None:
        """A new process of this role."""
        before = self.lives.get(role)
        life = Life(role, before.number + 1 if before is not None else 1)
        self.lives[role] = life
        token = _life.set(life)
        try:
            self.loop.create_task(self._live(life), name=life.name)
        finally:
            _life.reset(token)

    def crash(self, life: Life, restart_ms: int) -> None:
        """SIGKILL: nothing that this life still does reaches anybody."""
        if not life.alive:
            return
        life.alive = False
        for task in life.tasks:
            task.cancel()
        transport = self.transports.pop(life.name, None)
        if transport is not None:
            _close_pins(transport)
        self.restart(life.role, restart_ms / 1000)

    def restart(self, role: str, after_s: float) -> None:
        """As the supervisor does."""
        self.restarts += 1
        self.loop.call_later(after_s, self.start, role)

    async def _live(self, life: Life) -> None:
        try:
            await self._roles[life.role]()
        except asyncio.CancelledError:
            raise
        except RingError as error:
            if isinstance(error, HOPELESS):
                self.fail(error)
            elif life.alive:
                self.wire.steps.append(
                    Step(-1, self.loop.time(), life.name, "ENDS", (type(error).__name__, error))
                )
                self.crash(life, 100)
        except Exception as error:
            self.fail(error)
        else:
            if life.alive:
                life.alive = False
                self._left.add(life.role)
                if self._left == self._roles.keys() and not self._ended.done():
                    self._ended.set_result(None)

    def _adopt(self, task: NumberedTask) -> None:
        life = _life.get(None)
        if life is not None:
            life.tasks.append(task)

    def _end_all(self) -> None:
        for life in self.lives.values():
            life.alive = False
        tasks = [task for task in asyncio.all_tasks(self.loop) if not task.done()]
        for task in sorted(tasks, key=hash):
            task.cancel()

        async def ended() -> None:
            await asyncio.gather(*tasks, return_exceptions=True)

        self.loop.run_until_complete(ended())
        for transport in self.transports.values():
            _close_pins(transport)
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()
        self.wire.close()

    # Roles

    def broker(self) -> Broker:
        """The client of the present life."""
        return Broker(SimRedis(self.wire, _life.get()), RUN, "redis://sim", 60.0, True)

    @asynccontextmanager
    async def connected(self, _config: Config, _url: str) -> AsyncIterator[Broker]:
        """In the place of ``ringasync.runtime.joining.connected``."""
        yield self.broker()

    async def _coordinate(self) -> None:
        coordinator = Coordinator(
            self.config,
            Place("redis://sim", "none"),
            Shutdown(),
            source=lambda config, _model: words_source(config, size=PROMPTS),
        )
        await coordinator.run()

    async def _learn(self) -> None:
        args = RoleArgs(self.config, Path("sim.toml"), "redis://sim", "none")
        await run_learner(LearnerOptions(args), Shutdown())

    def _make_backend(self, _config: Config, _model: str) -> CountingBackend:
        self.backend = CountingBackend()
        return self.backend

    async def _work(self, name: str) -> None:
        broker, shutdown = self.broker(), Shutdown()
        if not await join_when_created(broker, self.config, shutdown):
            return
        transport = FileTransport(self.config.run_dir / "weights", 3)
        self.transports[_life.get().name] = transport
        grader = Grader(broker, self.config, str, lambda: worker.session.session_id)
        worker = RolloutWorker(
            self.config,
            broker,
            transport,
            _engine,
            lambda _folder: ModelLimits(48, EOS, 128),
            shutdown,
            worker_id=name,
            scratch_dir=self.config.run_dir / "scratch",
            companion=grader.run,
            more_status=grader.status,
        )
        await worker.run()
        await transport.close()

    @contextmanager
    def _in_the_place_of_processes(self) -> Iterator[None]:
        """Clocks, chance, sockets, torch, verifier processes and plots: see docs/simulation.md."""

        async def no_report(_self: Coordinator, _seat: Seat) -> None:
            """Plots take a second and read nothing but the metrics file."""

        with (
            virtual_process(self.loop, self.schedule.jitter),
            capture_logs() as self.logs,
            pytest.MonkeyPatch.context() as patch,
        ):
            for module in (learner.keeper, ringasync.coordinator.seat):
                patch.setattr(module, "os", SimpleNamespace(getpid=lambda: 1))
            for module in (learner.app, ringasync.coordinator.app):
                patch.setattr(module, "connected", self.connected)
            patch.setattr(learner.app, "make_backend", self._make_backend)
            patch.setattr(learner.loop, "shape_of_model", lambda _config: None)
            patch.setattr(workers.grader, "VerifierPool", HashVerifier)
            patch.setattr(Coordinator, "_write_report", no_report)
            yield


def _engine(_folder: Path) -> Engine:
    return ScriptedEngine(SamplingParams(1.0, EOS), step_interval_s=TOKEN_S)


def _close_pins(transport: FileTransport) -> None:
    """The kernel closes a dead process's files."""
    for descriptors in transport._pins.values():
        while descriptors:
            os.close(descriptors.pop())
