"""Log lines of a real process: who wrote them, in both forms, libraries and crashes included."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

_PROGRAM = """
import asyncio, logging, sys, warnings
from pathlib import Path
import structlog
from ringasync.observability.log import bind_identity, configure_logging, get_logger

configure_logging("worker", "demo", Path(sys.argv[1]), sys.argv[2])
log = get_logger()
log.info("starting", tokens=3)
bind_identity(worker="w-1", policy_version=4)

async def task():
    with structlog.contextvars.bound_contextvars(policy_version=5, rollout="g1.0"):
        log.info("in a task")
    log.debug("detail")

asyncio.run(task())
logging.getLogger("some.library").warning("library says %s", "hello")
warnings.warn("old call", UserWarning)
log.info("connecting", url="redis://user:secret@host:1/0")
try:
    raise ValueError("redis://user:secret@host:1 broke")
except ValueError:
    log.exception("caught")
raise RuntimeError("nobody caught me")
"""


def _run(run_dir: Path, level: str = "info") -> tuple[list[dict[str, Any]], str]:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(run_dir), level],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    (path,) = (run_dir / "logs").iterdir()
    assert path.name.startswith("worker-")
    return [json.loads(line) for line in path.read_text().splitlines()], done.stderr


def test_every_line_says_run_role_worker_and_version(tmp_path: Path) -> None:
    lines, _ = _run(tmp_path)
    for line in lines:
        assert {"run", "role", "worker", "policy_version", "timestamp", "level"} <= set(line)
        assert (line["run"], line["role"]) == ("demo", "worker")
    by_event = {line["event"]: line for line in lines}
    assert by_event["starting"]["worker"] is None
    assert by_event["starting"]["tokens"] == 3
    assert (by_event["in a task"]["worker"], by_event["in a task"]["policy_version"]) == ("w-1", 5)
    assert by_event["in a task"]["rollout"] == "g1.0"
    assert by_event["library says hello"]["policy_version"] == 4
    assert by_event["library says hello"]["logger"] == "some.library"


def test_warnings_and_uncaught_exceptions_are_logged(tmp_path: Path) -> None:
    lines, console = _run(tmp_path)
    assert any("old call" in line["event"] for line in lines)
    assert "RuntimeError: nobody caught me" in lines[-1]["exception"]
    assert lines[-1]["level"] == "critical"
    assert "RuntimeError: nobody caught me" in console


def test_no_password_reaches_a_log(tmp_path: Path) -> None:
    lines, console = _run(tmp_path)
    assert next(line for line in lines if line["event"] == "connecting")["url"] == (
        "redis://user:***@host:1/0"
    )
    assert "secret" not in json.dumps(lines)
    assert "connecting" in console


def test_the_level_filters(tmp_path: Path) -> None:
    quiet, _ = _run(tmp_path / "a")
    loud, _ = _run(tmp_path / "b", "debug")
    assert "detail" not in {line["event"] for line in quiet}
    assert "detail" in {line["event"] for line in loud}


def test_colours_on_a_terminal_only(tmp_path: Path) -> None:
    _, plain = _run(tmp_path / "a")
    assert "\x1b[" not in plain
    master, slave = pty.openpty()
    try:
        subprocess.run(
            [sys.executable, "-c", _PROGRAM, str(tmp_path / "b"), "info"],
            stderr=slave,
            timeout=30,
            check=False,
        )
        assert b"\x1b[" in os.read(master, 4096)
    finally:
        os.close(master)
        os.close(slave)


def test_configuring_again_moves_the_file_and_doubles_nothing(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from ringasync.observability.log import configure_logging, get_logger\n"
        "for name in 'ab':\n"
        "    print(configure_logging('r', 'x', Path(sys.argv[1]) / name, terminal=False))\n"
        "    get_logger().info('once')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stderr == ""
    for path in done.stdout.split():
        assert len(Path(path).read_text().splitlines()) == 1
