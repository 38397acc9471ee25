"""Verifiers with and without the sandbox: start of a process, verdicts/s of one, p99.

``python -m benchmarks.verdicts``. Rounds alternate, so that both see the same machine.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.machine import machine
from benchmarks.report import Result, Table, finish
from benchmarks.stats import percentile, spread
from ringasync.errors import EnvironmentRefusedError
from ringasync.rewards.pool import Isolation, VerifierPool

MEMORY_BYTES = 2 << 30
LIMIT_S = 10.0
RESPONSE = "x" * 400
KINDS: tuple[Isolation, ...] = ("off", "required")


@dataclass(frozen=True)
class Settings:
    """Each round starts a new process and asks it for ``verdicts`` verdicts, one at a time."""

    rounds: int = 5
    verdicts: int = 500


@dataclass(slots=True)
class _Samples:
    start_s: list[float] = field(default_factory=list)
    verdicts_per_s: list[float] = field(default_factory=list)
    verdict_s: list[float] = field(default_factory=list)


def constant(_task: dict[str, Any], _response: str) -> float:
    """The cheapest verdict: what remains is the pool's own cost."""
    return 0.5


async def measure(settings: Settings) -> Result:
    """Raises ``EnvironmentRefusedError`` without a sandbox: half a table would mislead."""
    samples = {kind: _Samples() for kind in KINDS}
    for _round in range(settings.rounds):
        for kind in KINDS:
            await _round_of(kind, settings, samples[kind])
    rows = []
    figures: dict[str, Any] = {}
    for kind, found in samples.items():
        p99_ms = 1e3 * percentile(found.verdict_s, 99)
        rows.append((kind, str(spread(found.start_s)), str(spread(found.verdicts_per_s)), p99_ms))
        figures[kind] = {
            "start_s": found.start_s,
            "verdicts_per_s": found.verdicts_per_s,
            "p99_ms": p99_ms,
        }
    table = Table(
        "one process, one job at a time",
        ("isolation", "start s", "verdicts/s", "p99 ms"),
        rows,
    )
    return Result("verdicts", asdict(settings), figures, [table])


async def _round_of(kind: Isolation, settings: Settings, samples: _Samples) -> None:
    pool = VerifierPool(1, LIMIT_S, MEMORY_BYTES, isolation=kind)
    task = {"verifier": "python:benchmarks.verdicts:constant"}
    if (refusal := pool.refusal(task["verifier"])) is not None:
        raise EnvironmentRefusedError(refusal)
    try:
        await pool.verify(task, RESPONSE)
        samples.start_s.append(pool.stats.start_s)
        began = time.perf_counter()
        for _verdict in range(settings.verdicts):
            asked = time.perf_counter()
            await pool.verify(task, RESPONSE)
            samples.verdict_s.append(time.perf_counter() - asked)
        samples.verdicts_per_s.append(settings.verdicts / (time.perf_counter() - began))
    finally:
        await pool.close()


def main(
    out: Annotated[Path | None, typer.Option(help="Write OUT.json and OUT.md.")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = Settings.rounds,
    verdicts: Annotated[int, typer.Option(min=1)] = Settings.verdicts,
) -> None:
    """Start, verdicts/s and p99 of a verifier's process, with and without the sandbox."""
    where = machine()
    result = asyncio.run(measure(Settings(rounds, verdicts)))
    finish([result], where, out)


if __name__ == "__main__":
    typer.run(main)
