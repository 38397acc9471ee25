"""Building the starting model in a process of its own; here the builder is small."""

from __future__ import annotations

import asyncio
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from ringasync.errors import RingError
from ringasync.runtime.shutdown import Shutdown
from ringasync.runtime.starter import build_starter, starter_command


def builder(source: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-I", "-c", textwrap.dedent(source), *arguments)


async def test_last_line_names_the_model(tmp_path: Path) -> None:
    command = builder("import sys; print('step 1'); print(sys.argv[1]); print()", str(tmp_path))
    assert await build_starter(command, 1, Shutdown()) == tmp_path


async def test_builder_gets_its_threads(tmp_path: Path) -> None:
    (tmp_path / "3").mkdir()
    source = "import os, sys; print(os.path.join(sys.argv[1], os.environ['OMP_NUM_THREADS']))"
    assert await build_starter(builder(source, str(tmp_path)), 3, Shutdown()) == tmp_path / "3"


@pytest.mark.parametrize(
    ("source", "code", "said"),
    [
        ("raise SystemExit(3)", 3, "exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", 137, "killed by SIGKILL"),
        ("", 1, "named no folder"),
        ("print('/no/such/folder')", 1, "named no folder"),
    ],
)
async def test_failed_builder_ends_with_its_code(source: str, code: int, said: str) -> None:
    with pytest.raises(RingError, match=said) as caught:
        await build_starter(builder(source), 1, Shutdown())
    assert caught.value.exit_code == code


async def test_stop_kills_the_builder(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    source = """
        import os, pathlib, sys, time
        pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
        time.sleep(600)
    """
    shutdown = Shutdown()
    building = asyncio.create_task(build_starter(builder(source, str(pid_file)), 1, shutdown))
    deadline = time.monotonic() + 20
    while not (pid_file.exists() and pid_file.read_text()):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    shutdown.request("SIGINT")
    assert await asyncio.wait_for(building, 20) is None
    assert not psutil.pid_exists(int(pid_file.read_text()))


def test_command_passes_overrides_on() -> None:
    command = starter_command(Path("a.toml"), ["run.seed=1", "starter.lr=0.1"])
    assert command[1:] == (
        *("-m", "learner.starter", "a.toml"),
        *("--set", "run.seed=1", "--set", "starter.lr=0.1"),
        "--print-path",
    )
