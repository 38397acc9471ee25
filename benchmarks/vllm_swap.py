"""What rollouts see of an in-flight weight swap: how long their tokens stop, and how true they are.

Rollouts generate in one engine while two sets of weights of one shape are published by turns and
taken up as the worker's ``WeightKeeper`` does: fetch, prepare, pause, load, resume, read back,
probe. Each way of loading gets an engine of its own, one after the other.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import uvloop
from redis.asyncio import Redis

from benchmarks.report import Cell, Result, Table, finish
from benchmarks.vllm_models import (
    SHAPES,
    machine_with_gpu,
    parse_engine_args,
    write_changed,
    write_model,
)
from benchmarks.vllm_swapper import HELD, Found, Mode, Settings, Swapper, mean_of, percent_of
from learner.peer_server import PeerServer
from ringasync.broker.embedded import EmbeddedRedis
from ringasync.observability.log import configure_logging
from ringasync.records.weights import WeightManifest
from ringasync.weights.file_transport import FileTransport
from ringasync.weights.redis_transport import RedisTransport
from ringasync.weights.transport import Transport
from workers.engines.vllm import setup

_REDIS_BYTES = 24 << 30


class _Offering(FileTransport):
    """The file transport of a learner that also serves what it publishes."""

    def __init__(self, root: Path, server: PeerServer) -> None:
        super().__init__(root)
        self._server = server

    async def publish(self, *args: Any, **kwargs: Any) -> WeightManifest:
        return self._server.offer(await super().publish(*args, **kwargs))

    async def close(self) -> None:
        self._server.close()
        await super().close()


@asynccontextmanager
async def _transport(kind: str, root: Path) -> AsyncIterator[Transport]:
    """The real transport. Redis gets a server of its own, as ``weights.redis_url`` wants it; with
    ``nccl`` this process is the learner, on the last GPU of several (the engine has the first)."""
    if kind != "redis":
        transport: Transport = FileTransport(root / "weights")
        if kind == "nccl":
            gpus = torch.cuda.device_count()
            device = f"cuda:{gpus - 1}" if gpus > 1 else "cpu"
            transport = _Offering(root / "weights", PeerServer(root / "weights", device))
        yield transport
        await transport.close()
        return
    server = EmbeddedRedis(root / "redis", _REDIS_BYTES)
    try:
        client = Redis.from_url(await server.start(), decode_responses=False)
        await client.config_set("appendonly", "no")
        await client.config_set("save", "")
        transport = RedisTransport(client, "bench", own_redis=True)
        yield transport
        await transport.close()
    finally:
        await server.stop()


async def measure(settings: Settings, modes: Sequence[Mode], model_dir: Path | None) -> Result:
    """All modes, one engine after the other."""
    found: dict[str, Found] = {}
    with tempfile.TemporaryDirectory(prefix="ringasync-bench-") as folder:
        root = Path(folder)
        first = write_model((model_dir or root) / settings.model, settings.model)
        second = await asyncio.to_thread(write_changed, root / "changed", first, settings.change)
        for number, mode in enumerate(modes):
            print(f"  {settings.model}, {settings.rollouts} rollouts: {mode}", flush=True)
            place = root / str(number)
            place.mkdir()
            swapper = Swapper(settings, mode, (first, second), place)
            async with _transport(settings.transport, place) as transport:
                await swapper.run(transport)
            found[str(mode)] = swapper.found
    return _result(settings, found)


def _result(settings: Settings, found: dict[str, Found]) -> Result:
    parts: list[list[Cell]] = []
    stalls: list[list[Cell]] = []
    truth: list[list[Cell]] = []
    figures: dict[str, Any] = {}
    for mode, one in found.items():
        held = [sum(rows) for rows in zip(*(one.parts[part] for part in HELD), strict=True)]
        times = {**one.parts, "held": held, "publish": one.publish}
        times |= {f"inside: {part}": seconds for part, seconds in one.inside.items()}
        for part, seconds in times.items():
            parts.append([mode, part, *(percent_of(seconds, p) for p in (50, 99))])
        both = [percent_of(one.usual, 50), *(percent_of(one.stalls, p) for p in (50, 99, 100))]
        stalls.append([mode, *both, float(len(one.stalls))])
        worst = max(one.errors, default=0.0)
        tokens = float(len(one.errors))
        truth.append([mode, mean_of(one.errors), worst, tokens, mean_of(one.probe_gaps)])
        figures[mode] = asdict(one) | {
            "held": held,
            "stall_p50_s": both[1],
            "stall_p99_s": both[2],
            "error_mean": mean_of(one.errors),
            "error_max": worst,
        }
    return Result(
        name=f"Weight swap with vLLM, {settings.model}, {settings.rollouts} rollouts",
        settings=asdict(settings),
        figures=figures,
        tables=[
            Table("Parts of a swap, s", ["mode", "part", "p50", "p99"], parts),
            Table(
                "Stall of a rollout, s",
                ["mode", "usual interval", "p50", "p99", "longest", "samples"],
                stalls,
                "Longest time without a token from the fetch until every rollout has a token of "
                "the new weights, less the rollout's usual interval just before.",
            ),
            Table(
                "Log-prob error after the swap, nats",
                ["mode", "mean", "largest", "tokens", "probe gap"],
                truth,
                "Recorded log-prob less that of the whole context under the new weights. The "
                "probe gap is between two answers of the same weights: what arithmetic is worth.",
            ),
        ],
        notes=[
            f"Tensors came by {_counted(found)} (counted swaps).",
            "Held is pause, load and resume: no step runs. fetch and prepare go on beside "
            "generation, read_back and score between its steps.",
            "Read-back found no difference after any swap, else there would be no result.",
        ],
    )


def _counted(found: dict[str, Found]) -> str:
    ways = Counter(way for one in found.values() for way in one.ways)
    return ", ".join(f"{way} {count} times" for way, count in sorted(ways.items()))


def main(
    model: Annotated[str, typer.Option(help=", ".join(SHAPES))] = Settings.model,
    rollouts: Annotated[int, typer.Option(min=1)] = Settings.rollouts,
    swaps: Annotated[int, typer.Option(min=1)] = Settings.swaps,
    load: Annotated[list[str] | None, typer.Option(help="layerwise, direct; repeatable.")] = None,
    kv: Annotated[
        list[str] | None, typer.Option(help="recompute, keep, rolling; repeatable.")
    ] = None,
    staging: Annotated[list[str] | None, typer.Option(help="device, host; repeatable.")] = None,
    transport: Annotated[str, typer.Option(help="file, redis or nccl.")] = Settings.transport,
    change: Annotated[float, typer.Option(help="Between the two sets.")] = Settings.change,
    length_scale: Annotated[float, typer.Option(help="1: 600 tokens.")] = Settings.length_scale,
    quiet_s: Annotated[float, typer.Option(min=0.05)] = Settings.quiet_s,
    checked: Annotated[int, typer.Option(min=0)] = Settings.checked,
    gather_ms: Annotated[int, typer.Option(min=0)] = Settings.gather_ms,
    gpu_memory: Annotated[float, typer.Option()] = Settings.gpu_memory,
    engine_args: Annotated[str, typer.Option(help="JSON.")] = "{}",
    model_dir: Annotated[Path | None, typer.Option(help="Keep the model here.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write OUT.json and OUT.md.")] = None,
) -> None:
    """Stall and truth of in-flight weight swaps."""
    if model not in SHAPES or transport not in ("file", "redis", "nccl"):
        raise typer.BadParameter("unknown model or transport")
    configure_logging("bench", "bench", None, "warning")
    setup.prepare()
    where = machine_with_gpu()
    settings = Settings(
        model=model,
        rollouts=rollouts,
        swaps=swaps,
        transport=transport,
        change=change,
        length_scale=length_scale,
        quiet_s=quiet_s,
        checked=checked,
        gather_ms=gather_ms,
        gpu_memory=gpu_memory,
        engine_args=parse_engine_args(engine_args),
    )
    ways = itertools.product(load or ["direct"], kv or ["recompute"], staging or ["device"])
    modes = [Mode(*way) for way in ways]
    finish([uvloop.run(measure(settings, modes, model_dir))], where, out)


if __name__ == "__main__":
    typer.run(main)
