"""Legs one after the other until enough faults were felt; after each the oracle."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from ringasync.broker.embedded import EmbeddedRedis
from ringasync.errors import RingError

from .leg import Leg, LegError
from .losses import Loss
from .oracle import Finished, check, check_replay, steps_without_loss
from .report import Report
from .stage import Stage

LEG_PROMPTS = 200
LEG_FAULTS = 100
"""A leg ends with its data, or earlier after so many faults: a new run has other settings."""


class ChaosError(Exception):
    """A run broke a promise; the message has the seed, what was broken, and where the files are."""


def campaign(
    folder: Path,
    model: Path,
    *,
    faults: int,
    seed: int,
    prompts: int = LEG_PROMPTS,
    minutes: float = float("inf"),
    say: Callable[[str], None],
    keep: Callable[[Report], None] = lambda _: None,
) -> Report:
    """Runs under seeds ``seed``, ``seed + 1`` ... until ``faults`` were felt.

    No run begins after ``minutes``. ``keep`` gets the report as it is after each run.

    Raises:
        ChaosError: something does not hold after a leg.
    """
    report, ends_s = Report(), time.monotonic() + 60 * minutes
    while report.faults < faults and time.monotonic() < ends_s:
        leg_seed = seed + len(report.tallies)
        wanted = min(LEG_FAULTS, faults - report.faults)
        one_leg(folder / f"seed-{leg_seed}", model, leg_seed, wanted, prompts, report, say)
        keep(report)
    return report


def one_leg(
    folder: Path,
    model: Path,
    seed: int,
    wanted: int,
    prompts: int,
    report: Report,
    say: Callable[[str], None],
) -> None:
    """One run under faults, then the oracle; what it found is added to ``report``."""
    stage = Stage(folder, model, seed, prompts)
    for kind, why in stage.skipped.items():
        say(f"seed {seed}: no {kind} faults: {why}")
    leg = Leg(stage, seed, wanted, say)
    problems, is_good = [], False
    try:
        tally = leg.run(prompts)
        finished = read_finished(stage.run_dir, prompts, leg.losses.found)
        problems = check(finished) + check_replay(stage.run_dir)
        is_good = not problems
    except (LegError, RingError) as error:
        problems = [f"{type(error).__name__}: {error}"]
    finally:
        logs = "" if is_good else stage.tail()
        stage.close(keep_disks=not is_good)
    if not is_good:
        raise ChaosError(_failure(seed, wanted, prompts, problems, folder, logs))
    report.tallies.append(tally)
    report.losses += leg.losses.found
    report.unmeasured += leg.losses.unmeasured
    report.steps += len(finished.records)
    report.steps_without_loss += len(steps_without_loss(finished))
    report.groups += ends_of(finished)
    report.tokens += Counter({k: v for k, v in finished.audit.counters.items() if v})
    say(
        f"seed {seed}: {len(tally.delivered)} faults felt in {tally.took_s:.0f} s, "
        f"{len(finished.records)} steps, {dict(ends_of(finished))}: everything holds"
    )
    shutil.rmtree(folder)


def read_finished(run_dir: Path, prompts: int, losses: Iterable[Loss] = ()) -> Finished:
    """What the ended run left, its Redis started once more on its log."""
    server = EmbeddedRedis(run_dir / "redis")
    url = server.start_blocking()
    try:
        return asyncio.run(Finished.read(run_dir, url, prompts, losses))
    finally:
        server.stop_blocking()


def ends_of(finished: Finished) -> Counter[str]:
    """Groups by their end."""
    ends = Counter(
        line["end"]
        for line in finished.lines
        if line.get("kind") == "outcome" and line["end"] != "ready" and not line.get("rollout")
    )
    ends["trained"] = sum(len(record.groups) for record in finished.records)
    return ends


def _failure(
    seed: int, wanted: int, prompts: int, problems: list[str], folder: Path, logs: str
) -> str:
    listed = "\n".join(f"  {problem}" for problem in problems[:20])
    (folder / "tail.txt").write_text(logs, encoding="utf-8")
    return (
        f"seed {seed} broke {len(problems)} promises:\n{listed}\n"
        f"files: {folder} (the logs' ends: tail.txt)\nrun this seed alone: "
        f"make chaos FAULTS={wanted} SEED={seed} PROMPTS={prompts}"
    )
