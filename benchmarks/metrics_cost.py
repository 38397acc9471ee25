"""What Prometheus metrics cost a rollout worker: tokens/s and CPU with and without, in one run.

``python -m benchmarks.metrics_cost``. The arms take turns on the same engine; a scraper in a
process of its own asks once a second in both (it finds nobody while metrics are off). Beside that,
what one heartbeat's update and one scrape take, measured by themselves: the cost that the arms can
hardly tell from noise on a busy machine.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop
from prometheus_client import CollectorRegistry, generate_latest

from benchmarks import worker
from benchmarks.machine import machine
from benchmarks.report import Result, Table, finish
from benchmarks.stats import paired_ratios, spread
from benchmarks.worker_arms import Meter, Speed, WorkerRounds
from ringasync.broker.embedded import EmbeddedRedis
from ringasync.observability.exporter import SHARED_OFFSET, Exporter
from ringasync.observability.families import FAMILIES
from ringasync.observability.log import configure_logging
from workers.intake import ModelLimits

ARMS = ("off", "on")
_PORT = 21_460
_REPEATS = 2000
_SCRAPER = """
import sys, time, urllib.request
url, seen = sys.argv[1], 0
while True:
    began = time.monotonic()
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            seen += b"ringasync_worker_generated_tokens_total" in answer.read()
    except OSError:
        pass
    print(seen, flush=True)
    time.sleep(max(0.0, float(sys.argv[2]) - (time.monotonic() - began)))
"""


@dataclass(frozen=True)
class Settings:
    """``work`` says what a round generates; each round is one turn of both arms."""

    rounds: int = 12
    scrape_every_s: float = 1.0
    work: worker.Settings = field(default_factory=worker.Settings)


async def measure(settings: Settings) -> Result:
    """Run both arms ``rounds`` times, after one round each that does not count."""
    groups = worker.make_groups(settings.work)
    speeds: dict[str, list[Speed]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory(prefix="ringasync-bench-") as folder:
        root = Path(folder)
        weights = worker.write_model(root / "model", settings.work)
        server, engine = EmbeddedRedis(root / "redis"), worker.make_engine(settings.work)
        try:
            url = await server.start()
            await engine.start(weights, 1)
            meter = Meter(engine)
            config = worker.make_config(settings.work, root)
            rounds = WorkerRounds(config, url, weights, ModelLimits(worker.WINDOW_TOKENS, ()))
            with scraping(settings.scrape_every_s, root / "scrapes") as scrapes:
                for number in range(settings.rounds + 1):
                    for arm in ARMS if number % 2 else ARMS[::-1]:
                        port = _PORT if arm == "on" else 0
                        speed = await rounds.round(meter, groups, port)
                        if number:
                            speeds[arm].append(speed)
                            rate = f"{speed.tokens_per_s:,.0f} tokens/s"
                            print(f"  round {number}/{settings.rounds} metrics {arm}: {rate}")
                num_scrapes = scrapes()
        finally:
            await engine.stop()
            await server.stop()
    if num_scrapes == 0:
        raise RuntimeError("nothing was scraped: the arm with metrics measured nothing")
    return _result(settings, speeds, num_scrapes)


@contextmanager
def scraping(every_s: float, log: Path) -> Iterator[Callable[[], int]]:
    """A scraper of the worker's port in a process of its own; gives how often it got metrics."""
    url = f"http://127.0.0.1:{_PORT + SHARED_OFFSET}/metrics"
    with log.open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, "-c", _SCRAPER, url, str(every_s)],
            stdin=subprocess.DEVNULL,
            stdout=sink,
        )
    try:
        yield lambda: int((log.read_text().split() or ["0"])[-1])
    finally:
        process.kill()
        process.wait()


def alone() -> dict[str, float]:
    """Microseconds of one heartbeat's update and of one scrape's text, all metrics present."""
    exporter = Exporter("bench", "worker", "w")
    status = {family.key: 12345.678 for family in FAMILIES if "worker" in family.roles}
    registry = CollectorRegistry()
    registry.register(exporter)
    exporter.set(status)
    return {
        "update_us": _each_us(lambda: exporter.set(status)),
        "scrape_us": _each_us(lambda: generate_latest(registry)),
    }


def _each_us(call: Callable[[], object]) -> float:
    began = time.process_time()
    for _ in range(_REPEATS):
        call()
    return (time.process_time() - began) / _REPEATS * 1e6


def mean_ci95(samples: Sequence[float]) -> tuple[float, float, float]:
    """Mean with a 95 % interval by the normal approximation; needs two samples."""
    mean = statistics.fmean(samples)
    half = 1.96 * statistics.stdev(samples) / math.sqrt(len(samples))
    return mean, mean - half, mean + half


def _result(settings: Settings, speeds: dict[str, list[Speed]], num_scrapes: int) -> Result:
    figures: dict[str, Any] = {"scrapes": num_scrapes, **alone()}
    rows: list[list[str | float]] = []
    for name, key in (("tokens/s", "tokens_per_s"), ("CPU us a token", "cpu_us_per_token")):
        values = {arm: [getattr(one, key) for one in speeds[arm]] for arm in ARMS}
        ratios = paired_ratios(values["on"], values["off"])
        mean, low, high = mean_ci95(ratios)
        figures |= {f"{key}_{arm}": values[arm] for arm in ARMS}
        figures[f"{key}_on_over_off"] = {"mean": mean, "ci95": [low, high], "rounds": ratios}
        for arm in ARMS:
            found = spread(values[arm])
            rows.append([f"{name}, metrics {arm}", found.median, found.low, found.high])
        rows.append([f"{name}, on over off: mean, 95 %", *(f"{v:.4f}" for v in (mean, low, high))])
    heartbeat_s = worker.make_config(settings.work, Path()).worker.heartbeat_ms / 1000
    share = (
        figures["update_us"] / heartbeat_s + figures["scrape_us"] / settings.scrape_every_s
    ) / 1e6
    figures["share_of_a_core"] = share
    return Result(
        name=f"Cost of metrics ({settings.work.engine} engine)",
        settings={"rounds": settings.rounds, "scrape_every_s": settings.scrape_every_s}
        | asdict(settings.work),
        figures=figures,
        tables=[Table("Worker", ["", "median / mean", "lowest", "highest"], rows)],
        notes=[
            f"{num_scrapes} scrapes were answered during the rounds with metrics.",
            f"By themselves: {figures['update_us']:.1f} us of CPU a heartbeat, "
            f"{figures['scrape_us']:.0f} us a scrape: {share:.4%} of one core at a heartbeat every "
            f"{heartbeat_s} s and a scrape every {settings.scrape_every_s} s.",
            "Aim: less than 1 % of the tokens/s.",
        ],
    )


def main(
    rounds: Annotated[int, typer.Option(min=2)] = Settings.rounds,
    engine: Annotated[str, typer.Option(help="transformers or scripted.")] = "transformers",
    rollouts: Annotated[int, typer.Option(help="Rollouts a round.", min=1)] = 192,
    out: Annotated[Path | None, typer.Option(help="Write OUT.json and OUT.md.")] = None,
) -> None:
    """Tokens/s of the rollout worker with Prometheus metrics over those without."""
    kind, where = worker.engine_of(engine), machine()
    configure_logging("bench", "bench", None, "warning")
    work = worker.Settings(rounds=rounds, engine=kind, rollouts=rollouts)
    finish([uvloop.run(measure(Settings(rounds=rounds, work=work)))], where, out)


if __name__ == "__main__":
    typer.run(main)
