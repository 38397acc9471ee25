"""Signals and the parent's watchdog, in real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from ringasync.runtime.shutdown import PARENT_PID_VARIABLE, Shutdown, watch_parent

ROLE = """
import asyncio, sys
from ringasync.errors import BrokerUnreachableError
from ringasync.runtime.role import run_role
from ringasync.runtime.shutdown import Shutdown

async def main(shutdown: Shutdown) -> int:
    print("up", flush=True)
    if "busy" in sys.argv:
        [sum(range(1000)) for _ in range(10**9)]
    if "refuse" in sys.argv:
        raise BrokerUnreachableError("no Redis at that address")
    if "bug" in sys.argv:
        raise RuntimeError("a bug")
    await shutdown.requested.wait()
    print("draining", shutdown.reason, flush=True)
    if "slow" in sys.argv:
        await asyncio.sleep(600)
    return 0

raise SystemExit(run_role(main))
"""


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", ROLE, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, stderr = process.communicate(timeout=20)
    return process.returncode, stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_drains(number: signal.Signals) -> None:
    process = start()
    assert read_line(process) == "up"
    process.send_signal(number)
    assert read_line(process) == f"draining {number.name}"
    assert finish(process) == (0, "")


def test_second_signal_ends_at_once_with_130() -> None:
    process = start("slow")
    assert read_line(process) == "up"
    process.send_signal(signal.SIGINT)
    assert read_line(process) == "draining SIGINT"
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 130


def test_second_signal_ends_a_role_whose_loop_is_held_up() -> None:
    process = start("busy")
    assert read_line(process) == "up"
    process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < deadline:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert finish(process)[0] == 130


def test_ring_error_is_one_line_and_its_exit_code() -> None:
    code, stderr = finish(start("refuse"))
    assert code == 3
    assert stderr == "BrokerUnreachableError: no Redis at that address\n"


def test_bug_keeps_its_traceback() -> None:
    code, stderr = finish(start("bug"))
    assert code == 1
    assert "Traceback" in stderr
    assert "RuntimeError: a bug" in stderr


def test_role_drains_when_its_supervisor_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "role.log"
    supervisor_source = textwrap.dedent(f"""
        import os, subprocess, sys, time
        env = {{**os.environ, {PARENT_PID_VARIABLE!r}: str(os.getpid())}}
        with open({str(log)!r}, "w") as out:
            child = subprocess.Popen([sys.executable, "-c", {ROLE!r}], stdout=out, stderr=out,
                                     env=env, start_new_session=True)
        print(child.pid, flush=True)
        time.sleep(600)
    """)
    supervisor = subprocess.Popen(
        [sys.executable, "-c", supervisor_source], stdout=subprocess.PIPE, text=True
    )
    role = psutil.Process(int(read_line(supervisor)))
    wait_for_text(log, "up")
    supervisor.kill()
    supervisor.communicate(timeout=20)
    wait_for_text(log, "draining SIGTERM")
    role.wait(timeout=20)


def wait_for_text(path: Path, text: str) -> None:
    deadline = time.monotonic() + 20
    while text not in (path.read_text() if path.exists() else ""):
        assert time.monotonic() < deadline, f"{text!r} did not appear in {path.name}"
        time.sleep(0.05)


def test_role_started_by_hand_has_no_watchdog() -> None:
    assert watch_parent({}) is None
    assert watch_parent({PARENT_PID_VARIABLE: "not a number"}) is None


async def test_sleep_ends_early_on_a_request() -> None:
    shutdown = Shutdown()
    assert await shutdown.sleep(0.001) is False
    sleeper = asyncio.create_task(shutdown.sleep(600))
    shutdown.request("done")
    shutdown.request("later reasons do not count")
    assert await asyncio.wait_for(sleeper, 5) is True
    assert shutdown.reason == "done"
