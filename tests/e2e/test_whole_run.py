"""Whole runs with real processes and a real Redis: nothing killed, then everything killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from learner.journal import Journal
from tests.e2e.tiny_run import TinyRun, ringasync, started, tiny_settings

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(420)]


def steps_done(run: TinyRun) -> int:
    """Learner steps that the metrics file knows of."""
    file = run.run_dir / "metrics.jsonl"
    return file.read_text().count('"kind":"step"') if file.exists() else 0


def check_finished(run: TinyRun, steps: int) -> None:
    """The run is done, its accounts balance, and no token was trained twice."""
    summary = run.summary()
    assert summary["ledger_balanced"] is True, run.tail()
    assert summary["steps"] == steps
    assert summary["tokens_trained"] == trained_once(run)
    assert summary["tokens_accepted"] >= summary["tokens_trained"]
    assert (run.run_dir / "report.html").stat().st_size > 10_000


def trained_once(run: TinyRun) -> int:
    """Tokens trained by the journal, after checking that each rollout is in one batch only."""
    seen: Counter[str] = Counter()
    tokens = 0
    # Opening begins a new life in the folder, so a copy is read.
    copy = run.run_dir.parent / f"journal-copy-{time.monotonic_ns()}"
    shutil.copytree(run.run_dir / "journal", copy)
    journal = Journal.open(copy, run.run_dir.name, fence=10**6)
    try:
        for _, record in journal.read():
            for selected in record.order:
                seen[selected.rollout_id] += 1
                tokens += selected.trained_tokens
    finally:
        journal.close()
    assert [rollout for rollout, times in seen.items() if times > 1] == []
    return tokens


@pytest.mark.parametrize("mode", ["pipelined", "rounds"])
def test_a_run_trains_to_its_end(tmp_path: Path, tiny_model: Path, mode: str) -> None:
    settings = tiny_settings(tmp_path, tiny_model, schedule__mode=mode)
    with started(tmp_path, settings) as run:
        assert run.wait(200) == 0, run.tail()
        check_finished(run, 8)
        again = subprocess.run(
            ringasync("up", run.config), capture_output=True, text=True, timeout=90, check=False
        )
        assert again.returncode == 0, again.stderr
        assert "finished" in again.stdout


def test_every_role_is_killed_and_the_run_goes_on(tmp_path: Path, tiny_model: Path) -> None:
    settings = tiny_settings(tmp_path, tiny_model, learner__steps=12)
    with started(tmp_path, settings) as run:
        for number, role in enumerate(["worker", "learner", "coordinator", "worker", "learner"]):
            at_least = 1 + 2 * number
            run.wait_until(lambda n=at_least: steps_done(run) >= n, f"step {at_least}")
            run.wait_until(lambda r=role: len(run.role_pids(r)) > 0, f"a {role}")
            os.kill(run.role_pids(role)[0], signal.SIGKILL)
        assert run.wait(300) == 0, run.tail()
        check_finished(run, 12)


@pytest.mark.parametrize(
    "point", ["reserved", "journalled", "committed", "stepped", "checkpointed", "published"]
)
def test_the_learner_dies_at_a_named_point_and_continues_exactly(
    tmp_path: Path, tiny_model: Path, point: str
) -> None:
    settings = tiny_settings(tmp_path, tiny_model, learner__steps=5)
    once = tmp_path / "crashed"
    with started(tmp_path, settings, RINGASYNC_CRASH_AT=f"{point}:3@{once}") as run:
        assert run.wait(240) == 0, run.tail()
        assert once.exists(), "the crash point was never reached"
        check_finished(run, 5)


def test_interrupt_drains_and_the_same_command_resumes(tmp_path: Path, tiny_model: Path) -> None:
    settings = tiny_settings(tmp_path, tiny_model, learner__steps=10)
    with started(tmp_path, settings) as run:
        run.wait_until(lambda: steps_done(run) >= 3, "step 3")
        os.kill(run.process.pid, signal.SIGINT)
        assert run.wait(60) == 130, run.tail()
        before = trained_once(run)
        assert before > 0
    with started(tmp_path, settings) as run:
        assert run.wait(200) == 0, run.tail()
        check_finished(run, 10)
        assert trained_once(run) > before
