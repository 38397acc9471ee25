"""``ringasync replay``: the learner once more over what a run recorded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ringasync.cli.options import RunsDirOption, SetOption
from ringasync.cli.target import resolve_run_dir
from ringasync.runtime.process import thread_environment
from ringasync.runtime.replay import check_label, replay_command, replay_settings

RUNS_DIR = Path("runs")


def replay(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Name or folder of the run.")],
    from_version: Annotated[
        int | None,
        typer.Option(
            "--from",
            min=0,
            metavar="VERSION",
            help="Begin at the newest checkpoint not above this policy version; default: at the "
            "starting model.",
        ),
    ] = None,
    overrides: SetOption = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="How many steps; default: all.")
    ] = None,
    label: Annotated[
        str,
        typer.Option(
            "--label",
            help="Folder under RUN/replay for the results, written anew; default: the changes.",
        ),
    ] = "",
    model: Annotated[
        str,
        typer.Option(
            "--model", metavar="PATH", help="Starting model, if it is not where the run had it."
        ),
    ] = "",
    runs_dir: RunsDirOption = RUNS_DIR,
) -> None:
    """Train a run's journal again, without Redis and workers, and compare the losses.

    With unchanged settings they must be the run's: exit code 1 and the first step that differs
    when they are not. With --set it shows what another correction makes of the same data.
    Nothing of the run is changed; results go to RUN/replay/LABEL.

    Example: ringasync replay demo --set loss.mismatch=tis --steps 50
    """
    run_dir = resolve_run_dir(run, runs_dir)
    chosen = tuple(overrides or ())
    config = replay_settings(run_dir, chosen).config
    command = replay_command(
        run_dir,
        chosen,
        from_version=from_version,
        steps=steps,
        label=check_label(label) if label else "",
        model=model,
    )
    environment = {**os.environ, **thread_environment(config.learner.threads)}
    os.execve(command[0], command, environment)  # noqa: S606 - no shell, our own interpreter
