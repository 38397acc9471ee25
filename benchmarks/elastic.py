"""What workers that join cost: a herd that pulls weights at once, and one until its first token.

``python -m benchmarks.elastic`` (not in ``make bench``: it starts many processes). The herd is real
processes with the real transports; meanwhile a role's heartbeat, one of the broker's scripts, is
timed on the run's Redis, and a learner publishes the next version.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import uvloop
from redis.asyncio import Redis
from safetensors.numpy import save_file

from benchmarks import worker
from benchmarks.machine import machine
from benchmarks.report import Cell, Result, Table, finish
from benchmarks.stats import percentile, spread
from benchmarks.worker_arms import WorkerRounds
from ringasync.broker.client import Broker
from ringasync.broker.embedded import EmbeddedRedis
from ringasync.observability.log import configure_logging
from ringasync.runtime.shutdown import Shutdown
from ringasync.weights.build import make_transport
from ringasync.weights.file_transport import FileTransport
from ringasync.weights.manifest import VersionFields, dump_manifest
from ringasync.weights.redis_transport import RedisTransport
from ringasync.weights.transport import Transport
from workers.engines.base import SamplingParams
from workers.engines.transformers_engine import TransformersEngine
from workers.intake import ModelLimits
from workers.rollout_loop import RolloutWorker

RUN = "bench-herd"
_TTL_MS = 600_000
_PROBE_EVERY_S = 0.005
_QUIET_S = 2.0
_MAXMEMORY_BYTES = 2 << 30
_JOIN_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Settings:
    """``weights_mb`` (2^20 bytes) is 64 at most: more is refused on the run's own Redis."""

    workers: int = 32
    weights_mb: int = 48
    joins: int = 5


@dataclass(frozen=True, slots=True)
class Herd:
    """One herd. Lists are seconds: of each client's pull, and of heartbeats before and during."""

    where: str
    pulls_s: list[float]
    quiet_s: list[float]
    during_s: list[float]
    publish_alone_s: float
    publish_during_s: float
    publish_held_s: float
    """While every client keeps the version before: what a wait for readers would show in."""


class Heartbeats:
    """Times one script on the run's Redis, again and again."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self.seconds: list[float] = []

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            began_s = time.perf_counter()
            await self._broker.heartbeat("probe", _TTL_MS, {})
            self.seconds.append(time.perf_counter() - began_s)
            await asyncio.sleep(_PROBE_EVERY_S)


async def herd(settings: Settings, where: str, folder: Path) -> Herd:
    """``where``: ``file``, ``redis`` (the run's own) or ``second redis``."""
    servers = [EmbeddedRedis(folder / name, _MAXMEMORY_BYTES) for name in ("run", "second")]
    urls = [await server.start() for server in servers]
    broker = await Broker.connect(urls[0], RUN)
    transport, place = _transport(where, folder, urls)
    try:
        await broker.create_run("", "bench")
        await broker.open_session("probe", "worker", _TTL_MS, {})
        began_s = time.perf_counter()
        manifest = await transport.publish(_weights(folder, 1, settings), _fields(1))
        alone_s = time.perf_counter() - began_s
        manifest_file = folder / "manifest.json"
        manifest_file.write_text(dump_manifest(manifest))
        sources = [_weights(folder, version, settings) for version in (2, 3)]
        clients = [
            await _client(place, manifest_file, folder / f"client-{number}")
            for number in range(settings.workers)
        ]
        quiet = Heartbeats(broker)
        with suppress(TimeoutError):
            await asyncio.wait_for(quiet.run(), _QUIET_S)
        during = Heartbeats(broker)
        beating = asyncio.create_task(during.run())
        _tell(clients)
        began_s = time.perf_counter()
        publishing = asyncio.create_task(transport.publish(sources[0], _fields(2)))
        took: list[float] = []
        publishing.add_done_callback(lambda _: took.append(time.perf_counter() - began_s))
        pulls_s = [float(await _said(client)) for client in clients]
        beating.cancel()
        await publishing
        began_s = time.perf_counter()
        await transport.publish(sources[1], _fields(3))
        held_s = time.perf_counter() - began_s
        _tell(clients)
        await asyncio.gather(*(client.wait() for client in clients))
        return Herd(where, pulls_s, quiet.seconds, during.seconds, alone_s, took[0], held_s)
    finally:
        await transport.close()
        await broker.close()
        for server in servers:
            await server.stop()


def _transport(where: str, folder: Path, urls: list[str]) -> tuple[Transport, str]:
    if where == "file":
        return FileTransport(folder / "weights"), str(folder / "weights")
    url = urls[where == "second redis"]
    return RedisTransport(Redis.from_url(url), RUN, own_redis=where == "second redis"), url


def _fields(version: int) -> VersionFields:
    return VersionFields(RUN, version, version - 1, 0, 1)


def _weights(folder: Path, seed: int, settings: Settings) -> Path:
    """An HF-format folder with ``weights_mb`` random megabytes."""
    source = folder / f"source-{seed}"
    source.mkdir()
    bulk = np.random.default_rng(seed).integers(0, 255, settings.weights_mb << 20, dtype=np.uint8)
    save_file({"model.bulk.weight": bulk}, source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    return source


async def _client(place: str, manifest: Path, into: Path) -> asyncio.subprocess.Process:
    """A client that has connected and waits for the word."""
    words = ("-m", "benchmarks.elastic_client", place, RUN, str(manifest), str(into))
    client = await asyncio.create_subprocess_exec(
        sys.executable, *words, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert await _said(client) == b"ready"
    return client


async def _said(client: asyncio.subprocess.Process) -> bytes:
    assert client.stdout is not None
    return (await client.stdout.readline()).strip()


def _tell(clients: list[asyncio.subprocess.Process]) -> None:
    for client in clients:
        assert client.stdin is not None
        client.stdin.write(b"\n")


class NotedEngine(TransformersEngine):
    """The CPU engine; notes when it can generate."""

    ready_s = 0.0

    async def start(self, weights_dir: Path, policy_version: int) -> None:
        """See ``Engine.start``."""
        await super().start(weights_dir, policy_version)
        self.ready_s = time.perf_counter()


class Joins(WorkerRounds):
    """Workers that join a run with waiting work, one a round; seconds until what."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.to_ready_s: list[float] = []
        self.to_accepted_s: list[float] = []

    async def join(self, number: int, make: Callable[[], NotedEngine]) -> None:
        """One worker in a run of its own, until Redis has accepted a token of it."""
        run = self._config.run.model_copy(update={"name": f"bench-join-{number}"})
        config, shutdown = self._config.model_copy(update={"run": run}), Shutdown()
        broker = await Broker.connect(self._url, run.name)
        await broker.create_run("", "bench", config.schedule.mode)
        fence = await broker.acquire_lock("coordinator", "bench", _TTL_MS)
        await broker.feed(fence, "feed", worker.make_groups(worker.Settings(rollouts=64)), "")
        await self._publish(broker, config)
        transport, engine = make_transport(config, broker), make()
        joining = RolloutWorker(
            config,
            broker,
            transport,
            lambda _: engine,
            lambda _: self._limits,
            shutdown,
            worker_id="joins",
            scratch_dir=config.run_dir / "scratch",
        )
        began_s = time.perf_counter()
        async with asyncio.timeout(_JOIN_TIMEOUT_S), asyncio.TaskGroup() as tasks:
            running = tasks.create_task(joining.run())
            while not (await broker.ledger()).get("accepted") and not running.done():
                await asyncio.wait([running], timeout=0.001)
            accepted_s = time.perf_counter()
            shutdown.request("measured")
        self.to_ready_s.append(engine.ready_s - began_s)
        self.to_accepted_s.append(accepted_s - engine.ready_s)
        await transport.close()
        await broker.delete_run()
        await broker.close()


async def joins(settings: Settings, folder: Path) -> Joins:
    """``settings.joins`` workers one after the other, with the demo's flush settings."""
    server = EmbeddedRedis(folder / "joins", _MAXMEMORY_BYTES)
    url = await server.start()
    model = worker.Settings()
    weights = worker.write_model(folder / "model", model)
    config = worker.make_config(model, folder)
    measured = Joins(config, url, weights, ModelLimits(worker.WINDOW_TOKENS, ()))
    try:
        for number in range(settings.joins + 1):
            await measured.join(number, _engine)
    finally:
        await server.stop()
    return measured


def _engine() -> NotedEngine:
    sampling = SamplingParams(temperature=1.0, eos_token_ids=())
    limit = worker.WINDOW_TOKENS
    return NotedEngine(sampling, max_concurrent=64, max_model_len_tokens=limit, seed=0, threads=1)


async def measure(settings: Settings) -> Result:
    """All three herds, then the joins; the first join, which imports, is left out."""
    herds = []
    for where in ("file", "redis", "second redis"):
        with tempfile.TemporaryDirectory(prefix="ringasync-bench-") as folder:
            herds.append(await herd(settings, where, Path(folder)))
        print(f"  {where}: slowest pull {max(herds[-1].pulls_s):.2f} s")
    with tempfile.TemporaryDirectory(prefix="ringasync-bench-") as folder:
        joined = await joins(settings, Path(folder))
    return _result(settings, herds, joined)


def _result(settings: Settings, herds: list[Herd], joined: Joins) -> Result:
    rows: list[list[Cell]] = [
        [
            each.where,
            *(percentile(each.pulls_s, percent) for percent in (50, 99)),
            settings.workers * settings.weights_mb,
            *(percentile(each.quiet_s, percent) * 1e3 for percent in (50, 99)),
            *(percentile(each.during_s, percent) * 1e3 for percent in (50, 99)),
            max(each.during_s) * 1e3,
            each.publish_alone_s,
            each.publish_during_s,
            each.publish_held_s,
        ]
        for each in herds
    ]
    columns = ["transport", "pull p50, s", "pull p99, s", "MB pulled", "heartbeat before p50, ms"]
    columns += ["p99, ms", "during p50, ms", "p99, ms", "longest, ms"]
    columns += ["publication alone, s", "beside the herd, s", "while all keep a version, s"]
    ready, accepted = spread(joined.to_ready_s[1:]), spread(joined.to_accepted_s[1:])
    steps: list[list[Cell]] = [
        ["worker begins to engine ready", ready.median, ready.low, ready.high],
        ["engine ready to first accepted token", accepted.median, accepted.low, accepted.high],
    ]
    return Result(
        name="Workers that join",
        settings=asdict(settings),
        figures={
            "herds": [asdict(each) for each in herds],
            "to_ready_s": joined.to_ready_s,
            "to_accepted_s": joined.to_accepted_s,
        },
        tables=[
            Table(
                f"{settings.workers} workers pull {settings.weights_mb} MB at once", columns, rows
            ),
            Table("One worker joins, s", ["", "median", "lowest", "highest"], steps),
        ],
        notes=[
            "The file transport hands the published folder itself to its readers: a pull is a "
            "lock and a checksum. A Redis pull writes a copy to the client's disk.",
            "Nothing in a publication waits for a reader. Beside the herd it shares cores and disk "
            "with it; in the last column all clients are there and keep their version, idle.",
            "Heartbeats are timed on the run's Redis from the measuring process, whose own wait "
            "for a core is in them.",
            "A first token is accepted at the first flush: worker.flush_tokens of a rollout or "
            "worker.flush_ms, whichever comes first.",
        ],
    )


def main(
    workers: Annotated[int, typer.Option(help="Clients of a herd.", min=1)] = 32,
    weights_mb: Annotated[int, typer.Option(min=1, max=64)] = 48,
    joins: Annotated[int, typer.Option(help="Workers that join.", min=1)] = 5,
    out: Annotated[Path | None, typer.Option(help="Write OUT.json and OUT.md.")] = None,
) -> None:
    """Herds on each transport, and single joins."""
    where = machine()
    configure_logging("bench", "bench", None, "warning")
    finish([uvloop.run(measure(Settings(workers, weights_mb, joins)))], where, out)


if __name__ == "__main__":
    typer.run(main)
