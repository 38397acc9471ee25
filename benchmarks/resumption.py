"""What a SIGKILL of a worker costs rollouts of 1k, 8k and 32k tokens: tokens and seconds.

``python -m benchmarks.resumption`` (not in ``make bench``: it takes minutes). Each arm is a run of
``ringasync up`` beside which this process starts scripted workers. One generates eight rollouts at
a pace that takes 20 s to the length of the arm, another waits without work; the first is killed,
and so on with the same rollouts. The engine writes down what it samples
(``workers/token_trace.py``), the broker's history says what the next holder began with. Arms:
``partials``, the worker's defaults; ``from the prompt``, workers that send a rollout only when it
has ended, as systems do that keep it in their engine.
"""

from __future__ import annotations

import asyncio
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
from benchmarks.stats import percentile
from ringasync.broker.client import Broker
from workers import token_trace

PARTIALS, FROM_THE_PROMPT = ARMS = ("partials", "from the prompt")
GROUP_SIZE = 4
_POLL_S = 0.05
_TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Settings:
    """``kills`` of the arm ``partials``; ``from the prompt`` has one."""

    tokens: tuple[int, ...] = (1024, 8192, 32768)
    kills: int = 4
    rollouts: int = 8
    fill_s: float = 20.0


@dataclass(frozen=True, slots=True)
class Resumed:
    """One rollout over one kill. ``had_tokens`` the killed engine had sampled, ``kept_tokens`` the
    next holder began with; seconds from the kill to its lease and to its first sampled token."""

    had_tokens: int
    kept_tokens: int
    leased_s: float
    sampled_s: float


@dataclass(slots=True)
class Trace:
    """A worker's trace file, read on as it grows: ``length`` of each rollout's response, and when
    (ms) the process sampled its ``first`` token of it."""

    file: Path
    length: dict[str, int] = field(default_factory=dict)
    first_ms: dict[str, int] = field(default_factory=dict)
    _read_bytes: int = 0

    def read(self) -> None:
        """Take in what is new; a line that is not whole waits."""
        if not self.file.exists():
            return
        with self.file.open("rb") as file:
            file.seek(self._read_bytes)
            whole = file.read().rpartition(b"\n")[0]
        self._read_bytes += len(whole) + 1 if whole else 0
        for line in whole.decode().splitlines():
            at_ms, rollout, tokens, _ = line.split()
            self.length[rollout] = int(tokens)
            self.first_ms.setdefault(rollout, int(at_ms))


@dataclass(slots=True)
class Worker:
    """A worker process; its session is known once it has one."""

    process: subprocess.Popen[bytes]
    trace: Trace
    session: str = ""

    def kill(self) -> float:
        """SIGKILL to all of it; when, in ms since 1970 (the broker's clock is this host's)."""
        at_ms = time.time() * 1000
        kill_worker(self.process)
        return at_ms


class Relay:
    """Workers that take the same rollouts from one another."""

    def __init__(
        self,
        config: Path,
        url: str,
        broker: Broker,
        traces: Path,
        rollouts: int,
        sends_partials: bool,
    ) -> None:
        self._config, self._url, self._broker = config, url, broker
        self._traces, self._rollouts = traces, rollouts
        self._sends_partials = sends_partials
        self._started = 0
        self._all: list[Worker] = []

    async def start(self) -> Worker:
        """A worker with a session; it takes what nobody holds."""
        self._started += 1
        env = {token_trace.ENV: str(self._traces)}
        process = start_worker(
            self._config,
            self._url,
            f"w{self._started}",
            sends_partials=self._sends_partials,
            **env,
        )
        worker = Worker(process, Trace(self._traces / str(process.pid)))
        self._all.append(worker)

        async def has_session() -> bool:
            for row in await self._broker.sessions():
                if row.get("pid") == str(process.pid):
                    worker.session = row["id"]
            return worker.session != ""

        await until(has_session, "a session")
        return worker

    async def hand_over(self, worker: Worker, heir: Worker, tokens: int) -> list[Resumed]:
        """Kill ``worker`` once each rollout has ``tokens``; wait until ``heir`` generates all."""

        async def is_filled() -> bool:
            worker.trace.read()
            lengths = worker.trace.length.values()
            return len(lengths) == self._rollouts and min(lengths) >= tokens

        await until(is_filled, f"{self._rollouts} rollouts of {tokens} tokens")
        killed_ms = worker.kill()
        worker.trace.read()

        async def is_resumed() -> bool:
            heir.trace.read()
            return len(heir.trace.first_ms) == self._rollouts

        await until(is_resumed, "the rollouts with their next holder")
        found = []
        for rollout, had in worker.trace.length.items():
            entries = await self._broker.history(rollout)
            lease = [
                entry
                for entry in entries
                if entry["event"] == "leased" and entry["worker"] == heir.session
            ][-1]
            sampled_s = (heir.trace.first_ms[rollout] - killed_ms) / 1000
            leased_s = (lease["t_ms"] - killed_ms) / 1000
            found.append(Resumed(had, lease["tokens"], leased_s, sampled_s))
        return found

    def end(self) -> None:
        """Kill all."""
        for worker in self._all:
            worker.kill()


async def until(holds: Callable[[], Any], what: str) -> None:
    """Wait for a condition. Raises ``RuntimeError`` when it does not come true in time."""
    deadline = time.monotonic() + _TIMEOUT_S
    while not await holds():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what}: not seen in {_TIMEOUT_S:g} s")
        await asyncio.sleep(_POLL_S)


def prepare(folder: Path, settings: Settings, tokens: int, arm: str) -> Path:
    """The run's TOML file: the worker's defaults, but for the pace and the number of rollouts."""
    worker: dict[str, Any] = {
        "engine_options": {"step_interval_s": settings.fill_s / tokens},
        "max_concurrent": settings.rollouts,
    }
    if arm == FROM_THE_PROMPT:
        worker["flush_tokens"] = NEVER_FLUSHED_TOKENS
    # Nothing is trained, and no more is fed than these rollouts.
    schedule = {"group_size": GROUP_SIZE, "budget": {"tokens": 1_000_000_000}}
    # Long enough that no answer ends, however long the waiting takes.
    longest = 3 * tokens + 30 * int(tokens / settings.fill_s) * settings.kills
    sections = {"worker": worker, "schedule": schedule, "data": {"epochs": 1}}
    return write_run(folder, longest, sections, prompts=settings.rollouts // GROUP_SIZE)


async def run_arm(folder: Path, settings: Settings, tokens: int, arm: str) -> list[Resumed]:
    """All kills of one arm, each on rollouts of at least ``tokens``."""
    config = prepare(folder, settings, tokens, arm)
    traces = folder / "traces"
    traces.mkdir()
    found = []
    async with up(config) as (broker, url):
        relay = Relay(config, url, broker, traces, settings.rollouts, arm == PARTIALS)
        try:
            worker = await relay.start()

            async def holds_all() -> bool:
                worker.trace.read()
                return len(worker.trace.length) == settings.rollouts

            await until(holds_all, "rollouts")
            for _ in range(settings.kills if arm == PARTIALS else 1):
                heir = await relay.start()
                found += await relay.hand_over(worker, heir, tokens)
                worker = heir
        finally:
            relay.end()
    return found


def tables(settings: Settings, found: dict[tuple[int, str], list[Resumed]]) -> Result:
    """A row an arm and length."""
    rows: list[list[Cell]] = []
    for (tokens, arm), all_of_it in found.items():
        again = [each.had_tokens - each.kept_tokens for each in all_of_it]
        reuse = [each.kept_tokens / each.had_tokens for each in all_of_it]
        leased = [each.leased_s for each in all_of_it]
        sampled = [each.sampled_s for each in all_of_it]
        rows.append(
            [
                f"{tokens}, {arm}",
                len(all_of_it),
                sum(e.kept_tokens for e in all_of_it) / sum(e.had_tokens for e in all_of_it),
                min(reuse),
                percentile(again, 50),
                max(again),
                *(percentile(leased, percent) for percent in (50, 99)),
                *(percentile(sampled, percent) for percent in (50, 99)),
            ]
        )
    columns = ["tokens at the kill", "rollouts", "kept, of all tokens", "least kept of one"]
    columns += ["tokens generated again, p50", "most"]
    columns += ["kill to lease, s: p50", "p99", "kill to first new token, s: p50", "p99"]
    return Result(
        name="Resumption after SIGKILL",
        settings=asdict(settings),
        figures={f"{t} {arm}": [asdict(e) for e in each] for (t, arm), each in found.items()},
        tables=[Table("Resumption", columns, rows, "The session of a killed worker lasts 5 s.")],
    )


def main(
    tokens: Annotated[str, typer.Option(help="Lengths at the kill, by comma.")] = "1024,8192,32768",
    kills: Annotated[int, typer.Option(min=1, help="A length, of partials.")] = Settings.kills,
    rollouts: Annotated[int, typer.Option(min=4, help="At once; in fours.")] = Settings.rollouts,
    fill_s: Annotated[float, typer.Option(help="To such a length.")] = Settings.fill_s,
    out: Annotated[Path | None, typer.Option(help="Write OUT.json and OUT.md.")] = None,
) -> None:
    """Tokens kept and seconds lost when a worker is killed, beside a start from the prompt."""
    settings = Settings(tuple(int(one) for one in tokens.split(",")), kills, rollouts, fill_s)
    where = machine()
    found: dict[tuple[int, str], list[Resumed]] = {}
    for length in settings.tokens:
        for arm in ARMS:
            with tempfile.TemporaryDirectory(prefix="ringasync-resumption-") as folder:
                found[length, arm] = asyncio.run(run_arm(Path(folder), settings, length, arm))
            print(f"{length}, {arm}: {len(found[length, arm])} rollouts resumed", flush=True)
    finish([tables(settings, found)], where, out)


if __name__ == "__main__":
    typer.run(main)
