"""What dying workers cost: trained tokens for each second that a worker lives, with and without.

``python -m benchmarks.goodput`` (not in ``make bench``: it takes minutes). Each arm is a run of
``ringasync up`` with a tiny model, beside which this process starts worker processes of the
scripted engine. Their pace is fixed far below what the machine can do, so that a dead worker frees
nothing for the others. Arms: ``no faults``; ``killed``, where each worker is killed by SIGKILL
after a random life and started again after a pause; ``from the prompt``, the same with workers that
send a rollout only when it has ended, so that whatever one had begun is generated again.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.machine import machine
from benchmarks.report import Cell, Result, Table, finish
from benchmarks.scripted_run import NEVER_FLUSHED_TOKENS, kill_worker, start_worker, up, write_run
from ringasync.broker.client import Broker

NO_FAULTS, KILLED, FROM_THE_PROMPT = ARMS = ("no faults", "killed", "from the prompt")
_MAX_STALENESS = 30
"""Steps: nothing goes stale, and a few times what the workers hold is admitted."""
_POLL_S = 0.25


@dataclass(frozen=True)
class Settings:
    """A worker makes ``concurrent / step_s`` tokens a second. ``life_s`` is the mean of an
    exponential distribution; a killed worker comes back after ``pause_s``. A start takes about 4 s
    of a core, so lives of 60 s and pauses of 4 s left two cores too little for the living: 94 %."""

    workers: int = 20
    concurrent: int = 6
    step_s: float = 0.05
    response_tokens: int = 512
    life_s: float = 120.0
    pause_s: float = 11.0
    warmup_s: float = 90.0
    """Until the first groups are trained and what kills hold up is held up: 40 s gave each arm the
    start's backlog in its window, and the killed one a longer way to it."""
    measure_s: float = 200.0
    budget_tokens: int = 8192
    seed: int = 0


@dataclass(slots=True)
class Slot:
    """A worker's place: its process, and when it is killed or started next."""

    name: str
    process: subprocess.Popen[bytes] | None = None
    lives: int = 0
    due_s: float = 0.0

    @property
    def worker_id(self) -> str:
        return f"{self.name}-{self.lives}"


@dataclass(slots=True)
class Sample:
    """What was true at ``at_s``: tokens trained so far, and worker-seconds lived so far, counted
    from the beginning of a worker's session to its kill."""

    at_s: float
    trained: int
    lived_s: float
    kills: int


@dataclass(slots=True)
class Tally:
    """Samples of an arm, one whenever the number of trained tokens has changed."""

    samples: list[Sample] = field(default_factory=list)

    def figures(self, workers: int) -> dict[str, float]:
        """Between the first and the last change; a step's tokens are trained all at once.

        Raises:
            ValueError: fewer than three steps were seen.
        """
        if len(self.samples) < 3:
            raise ValueError(f"only {len(self.samples)} steps were seen: measure for longer")
        first, last = self.samples[0], self.samples[-1]
        trained, lived_s = last.trained - first.trained, last.lived_s - first.lived_s
        wall_s = last.at_s - first.at_s
        return {
            "wall_s": wall_s,
            "steps": len(self.samples) - 1,
            "trained_tokens": trained,
            "kills": last.kills - first.kills,
            "dead_share": 1 - lived_s / (workers * wall_s),
            "trained_per_live_s": trained / lived_s,
        }


def prepare(folder: Path, settings: Settings, arm: str) -> Path:
    """The run's TOML file."""
    worker: dict[str, Any] = {
        "engine_options": {"step_interval_s": settings.step_s},
        "max_concurrent": settings.concurrent,
        "flush_tokens": NEVER_FLUSHED_TOKENS if arm == FROM_THE_PROMPT else 32,
        "flush_ms": 1000,
        "heartbeat_ms": 1000,
        "session_ttl_ms": 4000,
    }
    schedule: dict[str, Any] = {
        "group_size": 4,
        "budget": {"tokens": settings.budget_tokens},
        "pool_capacity": 2 * settings.workers * settings.concurrent,
        "max_staleness": _MAX_STALENESS,
        "max_attempts": 100_000,
    }
    run = {"seed": settings.seed}
    return write_run(
        folder, settings.response_tokens, {"run": run, "worker": worker, "schedule": schedule}
    )


class Workers:
    """Starts, kills and starts again; ``kills`` counts.

    The first starts are spread over the time of one rollout: all at once, the rollouts would end in
    waves, and a window that holds one wave more or less says little.
    """

    def __init__(self, config: Path, url: str, settings: Settings, arm: str) -> None:
        self._config, self._url, self._settings = config, url, settings
        self._dies, self._sends_partials = arm != NO_FAULTS, arm != FROM_THE_PROMPT
        self._random = random.Random(settings.seed)
        rollout_s = settings.response_tokens * settings.step_s
        began_s = time.monotonic()
        self.slots = [
            Slot(f"w{number}", due_s=began_s + rollout_s * number / settings.workers)
            for number in range(settings.workers)
        ]
        self.kills = 0

    def turn(self, now_s: float) -> None:
        """Do what is due."""
        for slot in self.slots:
            alive = slot.process is not None and slot.process.poll() is None
            if not alive and now_s >= slot.due_s:
                slot.lives += 1
                slot.process = start_worker(
                    self._config,
                    self._url,
                    slot.worker_id,
                    sends_partials=self._sends_partials,
                )
                slot.due_s = now_s + self._random.expovariate(1 / self._settings.life_s)
            elif alive and self._dies and now_s >= slot.due_s:
                self._end(slot)
                self.kills += 1
                slot.due_s = now_s + self._settings.pause_s

    def alive(self) -> set[str]:
        """Names of the processes that run."""
        return {s.worker_id for s in self.slots if s.process and s.process.poll() is None}

    def end(self) -> None:
        """Kill all."""
        for slot in self.slots:
            self._end(slot)

    def _end(self, slot: Slot) -> None:
        if slot.process is not None:
            kill_worker(slot.process)


async def watch(broker: Broker, workers: Workers, settings: Settings) -> Tally:
    """Kill and count until the time is over: consumes the sessions and the ledger, by polling."""
    tally, lived_s = Tally(), 0.0
    began_s = before_s = time.monotonic()
    trained_before = -1
    while (now_s := time.monotonic()) - began_s < settings.warmup_s + settings.measure_s:
        workers.turn(now_s)
        sessions = {one["worker"] for one in await broker.sessions()}
        lived_s += (now_s - before_s) * len(sessions & workers.alive())
        before_s = now_s
        trained = (await broker.ledger())["trained"]
        if trained_before not in (-1, trained) and now_s - began_s >= settings.warmup_s:
            tally.samples.append(Sample(now_s, trained, lived_s, workers.kills))
        trained_before = trained
        await asyncio.sleep(_POLL_S)
    return tally


async def run_arm(
    folder: Path, settings: Settings, arm: str, say: Callable[[str], None]
) -> dict[str, float]:
    """One run from its start to its end by SIGTERM."""
    config = prepare(folder, settings, arm)
    async with up(config) as (broker, url):
        workers = Workers(config, url, settings, arm)
        try:
            say(f"{arm}: up, {settings.workers} workers start")
            found = (await watch(broker, workers, settings)).figures(settings.workers)
            say(f"{arm}: {found}, ledger {await broker.ledger()}")
            return found
        finally:
            workers.end()


def tables(settings: Settings, found: dict[str, dict[str, float]]) -> Result:
    """Arms side by side, each against ``no faults``."""
    base = found.get(NO_FAULTS, {}).get("trained_per_live_s")
    rows: list[list[Cell]] = [
        [
            arm,
            one["trained_per_live_s"],
            one["trained_per_live_s"] / base if base else "",
            one["dead_share"],
            one["kills"],
            one["steps"],
            one["trained_tokens"],
            one["wall_s"],
        ]
        for arm, one in found.items()
    ]
    return Result(
        name="Goodput under kills",
        settings=asdict(settings),
        figures=dict(found),
        tables=[
            Table(
                "Goodput",
                [
                    "",
                    "trained tokens per live worker-second",
                    "of no faults",
                    "share of time dead",
                    "kills",
                    "steps",
                    "trained tokens",
                    "seconds",
                ],
                rows,
                "A worker lives from the beginning of its session to its kill; what comes before, "
                "its start, counts as dead.",
            )
        ],
    )


def main(
    arms: Annotated[str, typer.Option(help="Which, by comma.")] = ",".join(ARMS),
    workers: Annotated[int, typer.Option(min=1)] = Settings.workers,
    life_s: Annotated[float, typer.Option(help="Mean life of a worker.")] = Settings.life_s,
    pause_s: Annotated[float, typer.Option(help="From a kill to the restart.")] = Settings.pause_s,
    measure_s: Annotated[float, typer.Option(help="Of each arm.")] = Settings.measure_s,
    warmup_s: Annotated[float, typer.Option(help="Of each arm.")] = Settings.warmup_s,
    response_tokens: Annotated[int, typer.Option()] = Settings.response_tokens,
    seed: Annotated[int, typer.Option(help="Of the kills.")] = Settings.seed,
    out: Annotated[Path | None, typer.Option(help="Write OUT.json and OUT.md.")] = None,
) -> None:
    """Trained tokens per live worker-second without faults, under kills, and from the prompt."""
    chosen = [arm.strip() for arm in arms.split(",")]
    if unknown := set(chosen) - set(ARMS):
        raise typer.BadParameter(f"--arms: {sorted(unknown)} are none of {', '.join(ARMS)}")
    settings = Settings(
        workers=workers,
        life_s=life_s,
        pause_s=pause_s,
        measure_s=measure_s,
        warmup_s=warmup_s,
        response_tokens=response_tokens,
        seed=seed,
    )
    where, found = machine(), {}
    for arm in chosen:
        with tempfile.TemporaryDirectory(prefix="ringasync-goodput-") as folder:
            found[arm] = asyncio.run(
                run_arm(Path(folder), settings, arm, lambda line: print(line, flush=True))
            )
    finish([tables(settings, found)], where, out)


if __name__ == "__main__":
    typer.run(main)
