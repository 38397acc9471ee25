"""Ctrl-C and kill -9 on ``ringasync up`` itself, from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from ringasync.broker.embedded import live_url

ROOT = Path(__file__).parents[2]
DEADLINE_S = 40.0
TEXT = """
[run]
name = "small"
dir = "{runs}"
[model]
path = "{model}"
[[data.tasks]]
name = "sums"
kind = "mathematics"
"""


class Run:
    """One ``up`` with a role that takes ``drain_s`` to drain."""

    def __init__(self, folder: Path, drain_s: float) -> None:
        self.run_dir = folder / "runs" / "small"
        config = folder / "small.toml"
        config.write_text(TEXT.format(runs=folder / "runs", model=folder), encoding="utf-8")
        environment = {k: v for k, v in os.environ.items() if k != "RINGASYNC_REDIS_URL"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("up_driver.py")), config, str(drain_s)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment | {"PYTHONPATH": str(ROOT)},
        )

    @property
    def log(self) -> str:
        path = self.run_dir / "logs" / "worker-1.log"
        return path.read_text() if path.exists() else ""

    @property
    def role_pid(self) -> int:
        return int(self.log.rsplit("up ", 1)[1].split()[0])

    @property
    def redis_folder(self) -> Path:
        return self.run_dir / "redis"

    def wait_for(self, text: str, times: int = 1) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while self.log.count(text) < times:
            assert time.monotonic() < deadline, f"{text!r} not in the log: {self.log}"
            assert self.process.poll() is None or text == "drained", self.process.stdout
            time.sleep(0.05)

    def finish(self) -> tuple[int, str]:
        out, _ = self.process.communicate(timeout=DEADLINE_S)
        return self.process.returncode, out


@contextmanager
def up(folder: Path, drain_s: float = 0.0) -> Iterator[Run]:
    run = Run(folder, drain_s)
    try:
        yield run
    finally:
        if run.process.poll() is None:
            run.process.kill()
            run.process.communicate()


def gone(pid: int) -> bool:
    try:
        psutil.Process(pid).wait(timeout=DEADLINE_S)
    except psutil.NoSuchProcess:
        return True
    return not psutil.pid_exists(pid)


def test_ctrl_c_drains_and_ends_with_130(tmp_path: Path) -> None:
    with up(tmp_path) as run:
        run.wait_for("up")
        role = run.role_pid
        run.process.send_signal(signal.SIGINT)
        code, out = run.finish()
        assert code == 130
        assert "SIGINT: draining" in out
        assert "the same command goes on from here" in out
        assert "drained" in run.log
        assert gone(role)
        assert live_url(run.redis_folder) is None


def test_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    with up(tmp_path, drain_s=600) as run:
        run.wait_for("up")
        role = run.role_pid
        run.process.send_signal(signal.SIGINT)
        run.wait_for("asked")
        run.process.send_signal(signal.SIGINT)
        assert run.finish()[0] == 130
        assert gone(role)
        assert "drained" not in run.log
        deadline = time.monotonic() + DEADLINE_S
        while live_url(run.redis_folder) is not None:
            assert time.monotonic() < deadline, "the embedded Redis lives on"
            time.sleep(0.05)


def test_killed_supervisor_leaves_roles_that_drain_and_a_run_that_resumes(tmp_path: Path) -> None:
    with up(tmp_path) as run:
        run.wait_for("up")
        role = run.role_pid
        run.process.kill()
        assert run.finish()[0] == -signal.SIGKILL
        run.wait_for("drained")
        assert gone(role)
        orphan = live_url(run.redis_folder)
        assert orphan is not None
    with up(tmp_path) as run:
        run.wait_for("up", times=2)
        assert live_url(run.redis_folder) == orphan
        run.process.send_signal(signal.SIGTERM)
        assert run.finish()[0] == 130
        assert live_url(run.redis_folder) is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_during_start_ends_with_130_or_before(
    tmp_path: Path, number: signal.Signals
) -> None:
    with up(tmp_path) as run:
        deadline = time.monotonic() + DEADLINE_S
        while live_url(run.redis_folder) is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        run.process.send_signal(number)
        assert run.finish()[0] == 130
        assert live_url(run.redis_folder) is None


def test_ctrl_c_while_the_starting_model_is_built_says_so(tmp_path: Path) -> None:
    config = tmp_path / "small.toml"
    text = TEXT.format(runs=tmp_path / "runs", model="starter")
    config.write_text(text + 'dataset = "linear_equation"\n', encoding="utf-8")
    cache = tmp_path / "cache"
    process = subprocess.Popen(
        [sys.executable, "-m", "ringasync", "up", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "RINGASYNC_CACHE": str(cache)},
    )
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not list(cache.glob("starter/.building-*")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        builder = next(
            child
            for child in psutil.Process(process.pid).children()
            if "learner.starter" in " ".join(child.cmdline())
        )
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=DEADLINE_S)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    assert process.returncode == 130
    assert "before the starting model was built" in out
    assert gone(builder.pid)
