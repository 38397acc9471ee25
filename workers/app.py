"""Wires a rollout worker: logs, broker, weights, engine, grader."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import xxhash

from ringasync.broker.client import Broker
from ringasync.observability.exporter import exporting
from ringasync.observability.log import bind_identity, configure_logging, get_logger
from ringasync.runtime.joining import connected, join_when_created
from ringasync.runtime.role import RoleArgs
from ringasync.runtime.shutdown import Shutdown
from ringasync.weights.build import make_transport
from workers.engines.factory import EngineFactory, read_limits
from workers.grader import Grader, tokenizer_decoder
from workers.rollout_loop import RolloutWorker
from workers.scratch import scratch_folder

EXIT_NOT_DRAINED = 1
"""Stopped as asked, but leases were left to the session's end."""

log = get_logger()


def default_worker_id() -> str:
    """A name that no other living worker has: host and process."""
    return f"w-{socket.gethostname()}-{os.getpid()}"


async def work_role(args: RoleArgs, shutdown: Shutdown, worker_id: str = "") -> int:
    """The role's body: join the run, generate until it is done or a stop is asked for.

    Returns the exit code. Raises ``RingError`` with the code of what went wrong.
    """
    config, worker_id = args.config, worker_id or default_worker_id()
    configure_logging("worker", config.run.name, config.run_dir, config.observability.log_level)
    bind_identity(worker=worker_id)
    async with connected(config, args.redis_url) as broker:
        if not await join_when_created(broker, config, shutdown):
            return 0
        with scratch_folder() as scratch_dir:
            return await _work(args, broker, shutdown, worker_id, scratch_dir)


async def _work(
    args: RoleArgs, broker: Broker, shutdown: Shutdown, worker_id: str, scratch_dir: Path
) -> int:
    config = args.config
    seed = xxhash.xxh32_intdigest(f"{config.run.seed}/{worker_id}".encode()) & 0x7FFFFFFF
    factory = EngineFactory(config, seed)
    await asyncio.to_thread(factory.prepare)
    transport = make_transport(config, broker)
    grader: Grader | None = None
    if config.grader.in_worker:
        # It asks for the session's id at each call, so it may be made before the session.
        grader = Grader(
            broker, config, tokenizer_decoder(args.model), lambda: worker.session.session_id
        )
    worker = RolloutWorker(
        config,
        broker,
        transport,
        factory,
        lambda folder: read_limits(folder, config),
        shutdown,
        worker_id=worker_id,
        scratch_dir=scratch_dir,
        info={"host": socket.gethostname(), "pid": str(os.getpid())},
        more_status=grader.status if grader is not None else dict,
        companion=grader.run if grader is not None else None,
    )
    try:
        async with exporting(config, "worker", worker_id) as exporter:
            worker.session.listen(exporter.set)
            why = await worker.run()
    finally:
        await transport.close()
    log.info("worker ends", why=why)
    return 0 if worker.is_drained else EXIT_NOT_DRAINED
