"""All benchmarks, one after the other: what ``make bench`` runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import uvloop

from benchmarks import broker, learner_wait, worker
from benchmarks.machine import machine, today
from benchmarks.report import Result, finish
from ringasync.observability.log import configure_logging


def main(
    out: Annotated[
        Path | None, typer.Option(help="Write OUT.json and OUT.md [docs/results/bench-DATE].")
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Run folder for the learner's times; default: the newest.")
    ] = None,
    broker_rounds: Annotated[int, typer.Option(min=1)] = broker.Settings.rounds,
    worker_rounds: Annotated[int, typer.Option(min=1)] = worker.Settings.rounds,
) -> None:
    """Broker, worker, and the learner's times of the newest run."""
    where = machine()
    configure_logging("bench", "bench", None, "warning")
    results: list[Result] = []
    print("broker: append_many beside XADD")
    results.append(uvloop.run(broker.measure(broker.Settings(rounds=broker_rounds))))
    print("worker: the loop beside its bare engine")
    results.append(uvloop.run(worker.measure(worker.Settings(rounds=worker_rounds))))
    run_dir = run_dir or learner_wait.newest_run()
    if run_dir is None:
        print("learner: left out, no run under runs/ (make demo makes one; or --run-dir)")
    else:
        results.append(learner_wait.measure(run_dir))
    finish(results, where, out or Path("docs/results") / f"bench-{today()}")


if __name__ == "__main__":
    typer.run(main)
