"""How long training stands still for a publication: handed over beside it, and waited for.

``python -m benchmarks.publication [--device cuda|cpu] [--hidden N] [--layers N] [--vocab N]
[--steps N] [--transport file|redis] [--dir DIR]`` trains the same batches each way in a process of
its own, publishes after each with the learner's own publisher and a real Redis, and prints one JSON
line each.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.checkpoint import add_model_arguments, make_backend
from benchmarks.logprobs import batch_of
from learner.publisher import Publication, Publisher
from learner.worker_thread import TorchThread
from ringasync.broker.client import Broker
from ringasync.broker.embedded import EmbeddedRedis
from ringasync.config.schema import Config
from ringasync.weights.build import make_transport

LOCK_TTL_MS = 600_000


async def measure(
    arguments: argparse.Namespace, directory: Path, url: str, asynchronous: bool
) -> dict[str, object]:
    """Seconds that training stood still a publication, and what steps and announcements took."""
    config = Config.model_validate(
        {
            "run": {"name": "bench", "dir": str(directory)},
            "data": {"tasks": [{"name": "sums", "kind": "mathematics"}]},
            "learner": {"publish_async": asynchronous},
            "weights": {"transport": arguments.transport},
        }
    )
    backend, thread = make_backend(arguments), TorchThread(arguments.threads)
    batch = batch_of(arguments.tokens, arguments.vocab)
    await thread.run(backend.train_batch, batch)  # makes the optimizer's state, and warms up
    broker = await Broker.connect(url, "bench")
    await broker.create_run("", "0" * 64, "pipelined")
    fence = await broker.acquire_lock("learner", "bench", LOCK_TTL_MS)
    transport = make_transport(config, broker)
    publisher = Publisher(broker, fence, transport, backend, thread, config)
    stalls, steps, announcements = [], [], []
    began_run = time.perf_counter()
    for step in range(1, arguments.steps + 1):
        began = time.perf_counter()
        await thread.run(backend.train_batch, batch)
        steps.append(time.perf_counter() - began)
        began = time.perf_counter()
        await publisher.begin(Publication(step, 0, batch))
        stalls.append(time.perf_counter() - began)
        announcements.append(publisher.announce_s)
    began = time.perf_counter()
    await publisher.settle()
    ended = time.perf_counter()
    await transport.close()
    await broker.close()
    thread.close()
    return {
        "publish_async": asynchronous,
        "transport": arguments.transport,
        "device": arguments.device,
        "parameters": sum(p.numel() for p in backend.model.parameters()),
        "stalls_s": stalls,
        "announce_s": announcements[1:] if asynchronous else announcements,
        "last_settle_s": ended - began,
        "steps_s": steps,
        "run_s": ended - began_run,
    }


async def one_way(arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    """``measure`` with a Redis of its own."""
    server = EmbeddedRedis(folder / "redis")
    try:
        return await measure(arguments, folder, await server.start(), arguments.only == "async")
    finally:
        await server.stop()


def main() -> int:
    """Measure both ways, or one where ``--only`` names it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_model_arguments(parser)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--transport", choices=("file", "redis"), default="file")
    arguments = parser.parse_args()
    if arguments.only is None:
        for way in ("sync", "async"):
            command = [sys.executable, "-m", "benchmarks.publication", *sys.argv[1:]]
            subprocess.run([*command, "--only", way], check=True)
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        print(json.dumps(asyncio.run(one_way(arguments, Path(folder)))), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
