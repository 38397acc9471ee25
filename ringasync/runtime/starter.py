"""The small starting model: built by the learner's package in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from ringasync.config.load import config_hash
from ringasync.config.schema import Config
from ringasync.errors import RingError
from ringasync.runtime.process import describe_exit, thread_environment
from ringasync.runtime.roles import STARTER_MODULE, override_arguments
from ringasync.runtime.runfiles import RunRecord, begin_record, claim, read_record, write_settings
from ringasync.runtime.shutdown import Shutdown


def starter_command(config_path: Path, overrides: Sequence[str]) -> tuple[str, ...]:
    """The command that builds the model, or finds it built, and prints its folder last."""
    arguments = [str(config_path), *override_arguments(overrides), "--print-path"]
    return (sys.executable, "-m", STARTER_MODULE, *arguments)


async def build_starter(command: Sequence[str], threads: int, shutdown: Shutdown) -> Path | None:
    """Run the builder, its progress on our stderr; the model's folder, None after a stop.

    Raises:
        RingError: the builder failed or named no folder; ends with the builder's exit code.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, **thread_environment(threads)},
        start_new_session=True,
    )
    building = asyncio.create_task(process.communicate())
    stopping = asyncio.create_task(shutdown.requested.wait())
    try:
        await asyncio.wait({building, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not building.done():
            return None
        stdout, _ = building.result()
    finally:
        stopping.cancel()
        if not building.done():
            # The builder renames a whole model into place, so there is nothing to drain.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await asyncio.wait({building})
            Console(stderr=True).show_cursor()  # its progress bar had hidden it
    named = [line.strip() for line in stdout.decode("utf-8", "replace").splitlines()]
    folder = next((Path(line) for line in reversed(named) if line), None)
    if process.returncode != 0 or folder is None or not folder.is_dir():
        raise _failure(process.returncode or 0)
    return folder


def _failure(code: int) -> RingError:
    what = describe_exit(code) if code else "it named no folder as its last line"
    error = RingError(f"the starting model was not built: {what}")
    error.exit_code = code if code > 0 else 128 - code if code else 1
    return error


async def starter_of_run(
    config: Config, config_path: Path, overrides: Sequence[str], shutdown: Shutdown
) -> str | None:
    """Folder of the run's starting model: of its earlier start, else built; None after a stop."""
    known = _model_of_earlier_start(config)
    if known is not None:
        return known
    command = starter_command(config_path, overrides)
    folder = await build_starter(command, config.starter.threads, shutdown)
    return None if folder is None else str(folder)


async def prepare_run(
    config: Config, config_path: Path, overrides: Sequence[str], url: str, shutdown: Shutdown
) -> str | None:
    """Make the run's folder as ``ringasync up`` does; the model, or None after a stop.

    For roles started one by one in a folder that they share: the others read the model there.

    Raises:
        RingError: the folder is held or not writable, or the starting model was not built.
    """
    with claim(config.run_dir):
        record = RunRecord.of(config, config_path, url, "")
        begin_record(config.run_dir, record)
        model: str | None = config.model.path
        if model == "starter":
            model = await starter_of_run(config, config_path, overrides, shutdown)
        if model is not None:
            replace(record, model=model).write(config.run_dir)
            write_settings(config)
        return model


def _model_of_earlier_start(config: Config) -> str | None:
    """The starter this run already began with, so that a resumed run need not look for it."""
    record = read_record(config.run_dir)
    if record is None or record.config_hash != config_hash(config):
        return None
    return record.model if record.model and Path(record.model).is_dir() else None
