"""Wires the learner: broker, lock, journal, checkpoint, backend, transport, loop."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog
import torch

from learner.backends.base import Backend
from learner.backends.deepspeed_backend import DeepSpeedBackend
from learner.backends.ranked import RankedBackend, serve
from learner.backends.sharding import RankGroup
from learner.backends.torch_backend import TorchBackend, TorchSettings
from learner.checkpoint import load_latest
from learner.exported import note_step
from learner.journal import Journal, JournalReader
from learner.keeper import Keeper, acquire_role
from learner.loop import LearnerLoop
from learner.peer_server import PeerServer
from learner.publisher import Publisher
from learner.state import LearnerState
from learner.worker_thread import TorchThread
from ringasync.broker.client import Broker
from ringasync.broker.types import Fence
from ringasync.config.schema import Config
from ringasync.errors import RingError
from ringasync.observability.exporter import Exporter, exporting
from ringasync.runtime.joining import connected, join_when_created
from ringasync.runtime.role import RoleArgs
from ringasync.runtime.shutdown import Shutdown
from ringasync.weights.build import make_transport

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_RUN_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class LearnerOptions:
    """What the command line adds: ``wait_for_lock`` off exits with code 4 when the lock is held."""

    args: RoleArgs
    wait_for_lock: bool = True


def make_backend(config: Config, model: str) -> Backend:
    """The train engine, loaded with the starting weights; that of all ranks where this is rank 0 of
    several, and the others then run ``follow``."""
    if config.learner.ranks == 1:
        return _load(config, model, None)
    group = RankGroup.join(config.learner)
    return RankedBackend(_load(config, model, group), group.ranks)


def follow(config: Config, model: str) -> None:
    """The life of a rank other than 0: do what rank 0 does until it says that it ends."""
    torch.set_num_threads(config.learner.threads)
    group = RankGroup.join(config.learner)
    serve(_load(config, model, group), group.ranks)


def _load(config: Config, model: str, group: RankGroup | None) -> TorchBackend:
    kind = DeepSpeedBackend if config.learner.backend == "deepspeed" else TorchBackend
    return kind.from_pretrained(
        model,
        TorchSettings(
            learner=config.learner,
            loss=config.loss,
            temperature=config.sampling.temperature,
            dtype=_DTYPES[config.model.dtype],
            seed=config.run.seed,
            head_dtype=config.model.head_dtype,
            begin_offloaded=config.schedule.colocated,
        ),
        group,
    )


async def run_learner(options: LearnerOptions, shutdown: Shutdown) -> int:
    """A learner's whole life; returns the exit code.

    Raises ``RingError`` for everything that ends it early, each with its own code.
    """
    args = options.args
    config = args.config
    async with connected(config, args.redis_url) as broker:
        thread = TorchThread(config.learner.threads)
        backend: Backend | None = None
        try:
            # Several ranks first find each other: whatever happens then, they are told to leave.
            if config.learner.ranks > 1:
                backend = await thread.run(make_backend, config, args.model)
            if not await join_when_created(broker, config, shutdown):
                return 0
            if backend is None:
                backend = await thread.run(make_backend, config, args.model)
            fence = await acquire_role(
                broker,
                config.learner.lock_ttl_ms,
                shutdown,
                wait=options.wait_for_lock,
                report_s=config.learner.stall_report_s,
            )
            if fence is not None:
                async with exporting(config, "learner") as exporter:
                    await _run_under_lock(
                        broker, fence, backend, thread, config, shutdown, exporter
                    )
            return 0
        finally:
            if isinstance(backend, RankedBackend):
                await thread.run(backend.close)
            thread.close()


async def _run_under_lock(
    broker: Broker,
    fence: Fence,
    backend: Backend,
    thread: TorchThread,
    config: Config,
    shutdown: Shutdown,
    exporter: Exporter,
) -> None:
    keeper = Keeper(broker, fence, config.learner.lock_ttl_ms, exporter.set)
    keeper.status = {"doing": "starting", "step": 0, "steps": config.learner.steps}
    await keeper.beat()
    beating = asyncio.create_task(keeper.run(), name="learner-keeper")
    working = asyncio.create_task(
        _work(broker, fence, keeper, backend, thread, config, shutdown, exporter),
        name="learner-loop",
    )
    try:
        await asyncio.wait({beating, working}, return_when=asyncio.FIRST_COMPLETED)
        if beating.done():
            working.cancel()
            await asyncio.wait({working})
            beating.result()  # raises what ended the keeper
        working.result()
    finally:
        beating.cancel()
        working.cancel()
        await asyncio.wait({beating, working})
        with contextlib.suppress(RingError):  # the lock may be another's by now, or Redis away
            await keeper.close()


async def _work(
    broker: Broker,
    fence: Fence,
    keeper: Keeper,
    backend: Backend,
    thread: TorchThread,
    config: Config,
    shutdown: Shutdown,
    exporter: Exporter,
) -> None:
    journal = await asyncio.to_thread(
        Journal.open, journal_dir(config), config.run.name, fence=fence.token
    )
    transport = make_transport(config, broker)
    server = PeerServer.of(config) if config.weights.transport == "nccl" else None
    try:
        # The lock may have been lost while the chain was checked: then this life must not write.
        await broker.renew_lock(fence, config.learner.lock_ttl_ms)
        state = await thread.run(restore, config.run_dir, config.run.name, backend, journal)
        loop = LearnerLoop(
            broker=broker,
            fence=fence,
            keeper=keeper,
            backend=backend,
            thread=thread,
            journal=journal,
            publisher=Publisher(
                broker,
                fence,
                transport,
                backend,
                thread,
                config,
                *([server.offer] if server is not None else []),
            ),
            state=state,
            config=config,
            shutdown=shutdown,
            on_step=partial(note_step, exporter),
        )
        await loop.run()
    finally:
        journal.close()
        if server is not None:
            server.close()
        with contextlib.suppress(RingError):
            await transport.close()


def journal_dir(config: Config) -> Path:
    """Where the run's journal lies."""
    return config.run_dir / "journal"


def restore(
    run_dir: Path,
    run: str,
    backend: Backend,
    journal: JournalReader,
    max_version: int | None = None,
) -> LearnerState:
    """Load the newest checkpoint on the journal's chain into ``backend``; a fresh state if none.

    With ``max_version`` the newest one whose policy version is not above it.
    """
    log = structlog.get_logger(__name__)
    checkpoint = load_latest(
        run_dir / "checkpoints",
        run,
        accept=lambda meta: journal.covers(meta.life, meta.journal_offset),
        warn=log.warning,
        restore=backend.load,
        wanted=lambda meta: max_version is None or meta.policy_version <= max_version,
    )
    if checkpoint is None:
        return LearnerState()
    log.info("checkpoint restored", step=checkpoint.meta.step, name=checkpoint.meta.name)
    return LearnerState.from_meta(checkpoint.meta, checkpoint.carry)
