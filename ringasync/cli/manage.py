"""Commands that change a run: pause it, let it go on, remove it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from ringasync.cli.options import RedisUrlOption, RunOption, RunsDirOption
from ringasync.cli.target import Target, broker_of, resolve_target
from ringasync.errors import BrokerUnreachableError, ConfigError
from ringasync.runtime.runfiles import claim, remove_files

RUNS_DIR = Path("runs")


def pause(
    run: RunOption = "",
    redis_url: RedisUrlOption = "",
    runs_dir: RunsDirOption = RUNS_DIR,
    why: Annotated[str, typer.Option("--why", help="Shown to everybody who looks.")] = "by hand",
) -> None:
    """Stop generation of a run: workers stop, send the tokens they have and take nothing new.

    They keep their leases and go on where they stopped. The learner trains what is ready.
    `ringasync resume` lets the run go on.

    Example: ringasync pause --run demo --why "the machine is needed"
    """
    target = resolve_target(run, redis_url, runs_dir)
    asyncio.run(_set_paused(target, True, why))
    typer.echo(f"run {target.name} is paused ({why}); ringasync resume --run {target.name}")


def resume(
    run: RunOption = "", redis_url: RedisUrlOption = "", runs_dir: RunsDirOption = RUNS_DIR
) -> None:
    """Let a paused run go on, also one that stopped itself.

    That is: after too many quarantined groups, or when two workers refused a version and so
    blocked publication. The refused version is not loaded again; a learner that ended because
    of the block has to be started again unless `ringasync up` does it.

    Example: ringasync resume --run demo
    """
    target = resolve_target(run, redis_url, runs_dir)
    asyncio.run(_set_paused(target, False, ""))
    typer.echo(f"run {target.name} goes on")


async def _set_paused(target: Target, paused: bool, why: str) -> None:
    if not target.redis_url:
        raise ConfigError(f"run {target.name!r} is not up, so there is nothing to pause or resume")
    async with broker_of(target) as broker:
        await broker.set_paused(paused, why)


def rm(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Name or folder of the run.")],
    redis_url: RedisUrlOption = "",
    runs_dir: RunsDirOption = RUNS_DIR,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a run for good: its keys in Redis and its folder with checkpoints and reports.

    Refused while `ringasync up` works on it.

    Example: ringasync rm demo
    """
    target = resolve_target(run, redis_url, runs_dir)
    with claim(target.run_dir):
        if not yes:
            what = f"run {target.name!r}: {target.run_dir}"
            if target.redis_url:
                what += f" and its keys at {target.redis_url}"
            typer.confirm(f"Remove {what}?", abort=True)
        # An embedded Redis is a part of the folder; only another one has keys to delete.
        if target.redis_url:
            asyncio.run(_delete_keys(target, redis_url))
        remove_files(target.run_dir)
    _remove_folder(target.run_dir)
    typer.echo(f"run {target.name} is removed")


async def _delete_keys(target: Target, given_url: str) -> None:
    try:
        async with broker_of(target) as broker:
            await broker.delete_run()
    except BrokerUnreachableError:
        # A crash may have left the address of an embedded Redis that is gone with its keys.
        if given_url or not (target.run_dir / "redis").is_dir():
            raise


def _remove_folder(run_dir: Path) -> None:
    for leftover in run_dir.iterdir():
        leftover.unlink()
    run_dir.rmdir()
