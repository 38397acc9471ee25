"""How long the pages of ``ringasync ui`` take with many rollouts in Redis.

``python -m benchmarks.ui_pages``. A real Redis holds groups of eight at every stage, sessions,
steps and outcomes; ``ringasync ui`` runs in a process of its own; one client asks page after page.
The live view's snapshot serves for half a second: the client waits that long before asking for it,
so that every sample reads Redis.
"""

from __future__ import annotations

import asyncio
import http.client
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from benchmarks.broker_arms import example_payload
from benchmarks.machine import machine
from benchmarks.report import Result, Table, finish
from benchmarks.stats import percentile, spread
from ringasync.broker.client import Broker
from ringasync.broker.embedded import EmbeddedRedis
from ringasync.broker.types import AppendItem, Fence, Lease, NewGroup, Verdict, VersionInfo
from ringasync.config.load import config_hash, resolved_json
from ringasync.config.schema import Config
from ringasync.ui.live import FRESH_S

RUN = "bench"
SIZE = 8
AIM_MS = 200.0
_TTL_MS = 3_600_000
_A_CALL = 64
_TOKENS = 64
_PAYLOAD = example_payload(_TOKENS, 151_936)


@dataclass(frozen=True)
class Settings:
    """What Redis holds, and how often each page is asked for."""

    rollouts: int = 10_000
    sessions: int = 64
    steps: int = 500
    outcomes: int = 5000
    requests: int = 50


async def fill(url: str, settings: Settings) -> str:
    """Make the run: a fifth of the rollouts queued, the others leased, parked, finished, graded.

    Returns the id of a rollout that has been graded.
    """
    broker = await Broker.connect(url, RUN)
    try:
        config = Config.model_validate(
            {"run": {"name": RUN}, "data": {"tasks": [{"name": "sums", "kind": "mathematics"}]}}
        )
        await broker.create_run(resolved_json(config), config_hash(config))
        fence = await broker.acquire_lock("coordinator", "bench", _TTL_MS)
        learner = await broker.acquire_lock("learner", "bench", _TTL_MS)
        await broker.publish(learner, VersionInfo(1, 0, 0, "{}"))
        await _feed(broker, fence, "g", settings.rollouts // SIZE)
        for number in range(settings.sessions):
            name = f"w{number}"
            await broker.open_session(name, "worker", _TTL_MS, {"worker": f"worker-{number}"})
            await broker.heartbeat(name, _TTL_MS, {"doing": "generating", "tokens_per_s": 123.4})
        graded = await _work(broker, settings)
        for step in range(1, settings.steps + 1):
            figures = {
                "train_reward": 0.5,
                "mask_rate": 1e-3,
                "tokens_per_s": 1e4,
                "grad_norm": 1.0,
            }
            await broker.push_metrics("learner", {"step": step, **figures})
        await _feed(broker, fence, "q", settings.outcomes, "a bad prompt")
        return graded
    finally:
        await broker.close()


async def _feed(broker: Broker, fence: Fence, letter: str, groups: int, why: str = "") -> None:
    """New groups; with a reason they are quarantined at once, and only their end is recorded."""
    for first in range(0, groups, _A_CALL):
        some = [
            NewGroup(
                group_id=f"{letter}{number:06d}",
                kind="train",
                domain="bench",
                prompt="What is 12 * 34 + 56? " * 4,
                prompt_ids=tuple(range(64)),
                task={},
                source_index=number,
                size=SIZE,
                max_new_tokens=1024,
                quarantine_reason=why,
            )
            for number in range(first, min(first + _A_CALL, groups))
        ]
        await broker.feed(fence, f"feed-{letter}{first}", some, "")


async def _work(broker: Broker, settings: Settings) -> str:
    """Take four fifths; of five leases two stay, one is parked, two finish and one is graded."""
    graded = ""
    for turn in range(settings.rollouts * 4 // 5 // _A_CALL):
        session = f"w{turn % settings.sessions}"
        leases = await broker.take(session, _A_CALL, 1)
        await broker.append_many(session, [_append(lease) for lease in leases])
        await broker.park_many(session, [(x.rollout_id, x.token, "drain") for x in leases[2::5]])
        ended = [x for i, x in enumerate(leases) if i % 5 > 2]
        await broker.finish_many(session, [(x.rollout_id, x.token, "stop", _TOKENS) for x in ended])
        jobs = await broker.take_grading(session, len(ended) // 2)
        verdicts = [Verdict(job.rollout_id, job.token, 0.5, "", "42 " * 100) for job in jobs]
        await broker.grade_many(session, verdicts, 3, True, 64)
        graded = jobs[-1].rollout_id if jobs else graded
    return graded


def _append(lease: Lease) -> AppendItem:
    return AppendItem(lease.rollout_id, lease.token, 0, _TOKENS, _TOKENS, 1, _PAYLOAD)


@contextmanager
def serving(url: str) -> Iterator[str]:
    """``ringasync ui`` in a process of its own; its address."""
    command = [sys.executable, "-m", "ringasync", "ui", "--run", RUN, "--redis-url", url]
    process = subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[2]
    finally:
        process.kill()
        process.communicate()


def ask(address: str, path: str) -> tuple[float, int]:
    """Milliseconds until the whole page was there, and its bytes."""
    where = urlsplit(address)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=60)
    began = time.perf_counter()
    connection.request("GET", path)
    answer = connection.getresponse()
    size = len(answer.read())
    took_ms = (time.perf_counter() - began) * 1e3
    connection.close()
    if answer.status != 200:
        raise RuntimeError(f"{path}: status {answer.status}")
    return took_ms, size


def measure(settings: Settings) -> Result:
    """Fill, serve, ask."""
    figures: dict[str, Any] = {}
    rows: list[list[str | float]] = []
    with tempfile.TemporaryDirectory(prefix="ringasync-bench-") as folder:
        server = EmbeddedRedis(Path(folder) / "redis")
        url = server.start_blocking()
        try:
            graded = asyncio.run(fill(url, settings))
            with serving(url) as address:
                last = settings.rollouts // SIZE // 50
                for path in ("/", "/now", "/rollouts", f"/rollouts?page={last}",
                             f"/rollout/{graded}", "/samples"):  # fmt: skip
                    first_ms, size = ask(address, path)
                    samples = [_later(address, path) for _ in range(settings.requests)]
                    found, p99 = spread(samples), percentile(samples, 99)
                    rows.append([path, first_ms, found.median, p99, found.high, size / 1024])
                    figures[path] = {"first_ms": first_ms, "ms": samples, "bytes": size}
        finally:
            server.stop_blocking()
    worst = max(max(row["first_ms"], *row["ms"]) for row in figures.values())
    columns = ["page", "first ms", "median ms", "p99 ms", "highest ms", "KiB"]
    return Result(
        name="Pages of `ringasync ui`",
        settings=asdict(settings),
        figures={**figures, "worst_ms": worst},
        tables=[Table("One client", columns, rows)],
        notes=[
            f"Aim: {AIM_MS:.0f} ms or less; the slowest of all requests took {worst:.0f} ms.",
            "The first request of the live view reads all steps and outcomes that Redis holds.",
        ],
    )


def _later(address: str, path: str) -> float:
    if path in ("/", "/now"):
        time.sleep(FRESH_S + 0.05)
    return ask(address, path)[0]


def main(
    out: Annotated[Path | None, typer.Option(help="Write OUT.json and OUT.md.")] = None,
    rollouts: Annotated[int, typer.Option(min=SIZE)] = Settings.rollouts,
    sessions: Annotated[int, typer.Option(min=1)] = Settings.sessions,
    requests: Annotated[int, typer.Option(min=1)] = Settings.requests,
) -> None:
    """How long each page of ``ringasync ui`` takes."""
    where = machine()
    settings = Settings(rollouts=rollouts, sessions=sessions, requests=requests)
    finish([measure(settings)], where, out)


if __name__ == "__main__":
    typer.run(main)
