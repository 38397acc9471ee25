"""Commands that run something: the whole run, one role of it, or its Redis alone."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from ringasync.cli.options import ConfigArgument, ModelOption, RedisUrlOption, SetOption, WaitOption
from ringasync.config.load import load_config
from ringasync.errors import ConfigError
from ringasync.runtime.role import resolve_redis_url
from ringasync.runtime.roles import Place, role_command
from ringasync.runtime.runfiles import read_record

_LOOK_AGAIN_S = 0.5


def up(
    config: ConfigArgument,
    overrides: SetOption = None,
    redis_url: RedisUrlOption = "",
    model: ModelOption = "",
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete what an earlier run of this name left first.")
    ] = False,
    plain: Annotated[
        bool, typer.Option("--plain", help="Progress as lines, also on a terminal.")
    ] = False,
) -> None:
    """Run everything on this machine: Redis if embedded, coordinator, workers, learner.

    The same command again goes on where a stopped run was. Roles that die are started again.
    Ctrl-C drains; once more stops at once.

    Example: ringasync up configs/demo.toml --set run.seed=3
    """
    from ringasync.cli.running import run_up
    from ringasync.runtime.up import UpOptions

    options = UpOptions(config, tuple(overrides or ()), redis_url, model, fresh, plain)
    raise typer.Exit(run_up(options))


def coordinator(
    config: ConfigArgument,
    overrides: SetOption = None,
    redis_url: RedisUrlOption = "",
    model: ModelOption = "",
    prepare: Annotated[
        bool,
        typer.Option("--prepare", help="Build the starting model first, where `starter` is named."),
    ] = False,
) -> None:
    """Run the coordinator: feeds prompts, closes rounds, returns the work of dead sessions.

    One at a time; a second waits for the first to be gone.

    Example: ringasync coordinator configs/demo.toml --redis-url redis://10.0.0.5:6379/0
    """
    if prepare and not model:
        from ringasync.cli.running import run_prepare

        chosen = load_config(config, overrides or ())
        url = resolve_redis_url(chosen, redis_url)
        model = run_prepare(chosen, config, tuple(overrides or ()), url)
    become("coordinator", config, overrides, redis_url, model)


def worker(
    config: ConfigArgument,
    overrides: SetOption = None,
    redis_url: RedisUrlOption = "",
    model: ModelOption = "",
    wait: WaitOption = False,
) -> None:
    """Run one more rollout worker; it joins the run, takes the newest weights and generates.

    Start as many as you like, stop any at any time: its rollouts are resumed by others.

    Example (second terminal, while `ringasync up` runs): ringasync worker configs/demo.toml
    """
    become("worker", config, overrides, redis_url, model, wait=wait)


def learner(
    config: ConfigArgument,
    overrides: SetOption = None,
    redis_url: RedisUrlOption = "",
    model: ModelOption = "",
    wait: WaitOption = False,
) -> None:
    """Run the learner: batches, IcePop steps, checkpoints, new weights.

    Resumes from its checkpoint and journal in the run's folder. One at a time.

    Example: ringasync learner configs/demo.toml --redis-url redis://10.0.0.5:6379/0
    """
    become("learner", config, overrides, redis_url, model, wait=wait)


def grader(
    config: ConfigArgument,
    overrides: SetOption = None,
    redis_url: RedisUrlOption = "",
    model: ModelOption = "",
    wait: WaitOption = False,
) -> None:
    """Run a grader by itself; for runs with grader.in_worker = false.

    Example: ringasync grader configs/demo.toml --set grader.in_worker=false
    """
    become("grader", config, overrides, redis_url, model, wait=wait)


def become(
    role: str,
    config_path: Path,
    overrides: list[str] | None,
    redis_url: str,
    model: str,
    *,
    wait: bool = False,
) -> None:
    """Turn this process into the role; what is wrong with the command line is said before."""
    chosen = tuple(overrides or ())
    config = load_config(config_path, chosen)
    url = resolve_redis_url(config, redis_url)
    named = model or config.model.path
    if named == "starter":
        named = _built_starter(config.run_dir, wait)
    command = role_command(role, Place(config_path, chosen, url, named))
    os.execv(command[0], command)  # noqa: S606 - no shell, our own interpreter


def _built_starter(run_dir: Path, wait: bool) -> str:
    """The folder of the run's starting model.

    Waits for: the run's record with a model that was built, if ``wait``. Ended by: a signal.
    """
    said = False
    while (record := read_record(run_dir)) is None or record.model in ("", "starter"):
        if not wait:
            raise ConfigError(
                f"model.path is 'starter', but {run_dir} holds no run that built one: start "
                "the run with `ringasync up` here, or give the model's folder by --model"
            )
        if not said:
            print(f"waiting for {run_dir}: the coordinator builds the starting model", flush=True)
            said = True
        time.sleep(_LOOK_AGAIN_S)
    return record.model


def redis(config: ConfigArgument, overrides: SetOption = None) -> None:
    """Run only the embedded Redis of a run, until Ctrl-C; for roles started one by one.

    Example: ringasync redis configs/demo.toml
    """
    from ringasync.cli.running import run_redis

    raise typer.Exit(run_redis(load_config(config, overrides or ())))
