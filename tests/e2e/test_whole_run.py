"""Whole runs with real processes and a real Redis: nothing killed, then everything killed."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from learner.journal import Journal
from ringasync.broker.core import text
from tests.e2e.tiny_run import TinyRun, ringasync, started, tiny_settings

MAX_GAP_NATS = 1e-4

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(420)]


def steps_done(run: TinyRun) -> int:
    """Learner steps that the metrics file knows of."""
    file = run.run_dir / "metrics.jsonl"
    return file.read_text().count('"kind":"step"') if file.exists() else 0


def has_done(run: TinyRun, steps: int) -> bool:
    """Whether the learner has made this many steps."""
    return steps_done(run) >= steps


def has_role(run: TinyRun, role: str) -> bool:
    """Whether a process of this role runs."""
    return len(run.role_pids(role)) > 0


def check_finished(run: TinyRun, steps: int) -> None:
    """The run is done, its accounts balance, and no token was trained twice."""
    summary = run.summary()
    assert summary["ledger_balanced"] is True, run.tail()
    assert summary["steps"] == steps
    assert summary["tokens_trained"] == trained_once(run)
    assert summary["tokens_accepted"] >= summary["tokens_trained"]
    assert (run.run_dir / "report.html").stat().st_size > 10_000
    gaps = age_zero_gaps(run)
    assert gaps, "no step trained a token of its own version"
    assert max(gaps) < MAX_GAP_NATS


def age_zero_gaps(run: TinyRun) -> list[float]:
    """Largest log-prob gap, engine against learner, of each step with tokens of the very weights
    that were trained: mostly weights that were swapped in during rollouts."""
    lines = map(json.loads, (run.run_dir / "metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if line["kind"] == "step"]
    return [line["gap_max"] for line in steps if line["gap_max"] is not None]


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


@pytest.mark.parametrize(
    ("mode", "transport"), [("pipelined", "file"), ("rounds", "file"), ("pipelined", "redis")]
)
def test_a_run_trains_to_its_end(
    tmp_path: Path, tiny_model: Path, mode: str, transport: str
) -> None:
    settings = tiny_settings(
        tmp_path, tiny_model, schedule__mode=mode, weights__transport=transport
    )
    with started(tmp_path, settings) as run:
        assert run.wait(200) == 0, run.tail()
        check_finished(run, 8)
        assert (run.run_dir / "weights").exists() is (transport == "file")
        again = subprocess.run(
            ringasync("up", run.config), capture_output=True, text=True, timeout=90, check=False
        )
        assert again.returncode == 0, again.stderr
        assert "finished" in again.stdout


async def resumed_elsewhere(run: TinyRun) -> list[str]:
    """Rollouts whose session died with tokens and that another session went on with."""
    found = []
    async with run.broker() as broker:
        async for key in broker.client.scan_iter(match=broker.keys.history("*"), count=1000):
            rollout = key.decode().rpartition(":")[2]
            owner, lost_by = "", ""
            for entry in await broker.history(rollout):
                if entry["event"] == "lost":
                    lost_by = entry["worker"]
                elif entry["event"] == "leased":
                    owner = entry["worker"]
                    if lost_by and owner != lost_by and entry["tokens"] > 0:
                        found.append(rollout)
    return found


async def half_done(run: TinyRun, pid: int) -> list[str]:
    """Rollouts with accepted tokens that the worker of this process holds for generation."""
    found = []
    async with run.broker() as broker:
        for session in await broker.sessions():
            if session["role"] != "worker" or session["pid"] != str(pid):
                continue
            leases = await broker.client.smembers(broker.keys.leases(session["id"]))
            for rollout in map(text, leases):
                fields = await broker.rollout(rollout) or {}
                if fields.get("state") == "leased" and int(fields["tokens"]) > 0:
                    found.append(rollout)
    return found


def kill_with_half_done(run: TinyRun) -> bool:
    """Kill a worker if it holds half-done rollouts; it is held still while that is looked up."""
    pids = run.role_pids("worker")
    if len(pids) < 2:
        return False  # somebody must live to resume them
    os.kill(pids[0], signal.SIGSTOP)
    lost = asyncio.run(half_done(run, pids[0]))
    os.kill(pids[0], signal.SIGKILL if lost else signal.SIGCONT)
    return lost != []


def test_every_role_is_killed_and_the_run_goes_on(tmp_path: Path, tiny_model: Path) -> None:
    settings = tiny_settings(
        tmp_path, tiny_model, learner__steps=20
    )  # more than pass while a busy machine kills
    with started(tmp_path, settings) as run:
        run.wait_until(partial(has_done, run, 1), "step 1")
        run.wait_until(partial(kill_with_half_done, run), "a worker with half-done rollouts")
        run.wait_until(lambda: asyncio.run(resumed_elsewhere(run)) != [], "a resumption")
        for number, role in enumerate(["learner", "coordinator", "worker", "learner"]):
            at_least = 3 + 2 * number
            run.wait_until(partial(has_done, run, at_least), f"step {at_least}")
            run.wait_until(partial(has_role, run, role), f"a {role}")
            os.kill(run.role_pids(role)[0], signal.SIGKILL)
        assert run.wait(300) == 0, run.tail()
        check_finished(run, 20)


@pytest.mark.parametrize("point", ["taken", "appended", "finished", "swapping"])
def test_a_worker_dies_at_a_named_point_and_its_rollouts_are_finished(
    tmp_path: Path, tiny_model: Path, point: str
) -> None:
    settings = tiny_settings(tmp_path, tiny_model, learner__steps=4)
    once = tmp_path / "crashed"
    with started(tmp_path, settings, RINGASYNC_CRASH_AT=f"{point}@{once}") as run:
        assert run.wait(240) == 0, run.tail()
        assert once.exists(), "the crash point was never reached"
        check_finished(run, 4)


def test_a_third_worker_joins_a_running_run(tmp_path: Path, tiny_model: Path) -> None:
    settings = tiny_settings(tmp_path, tiny_model, learner__steps=400)
    with started(tmp_path, settings) as run:
        run.wait_until(partial(has_done, run, 1), "step 1")
        command = ringasync("worker", run.config)
        third = subprocess.Popen(command, env=run.env, stdin=subprocess.DEVNULL)
        try:
            run.wait_until(lambda: asyncio.run(finishing_workers(run)) >= 3, "a third worker")
        finally:
            third.terminate()
        assert third.wait(30) == 0
        os.kill(run.process.pid, signal.SIGINT)
        assert run.wait(60) == 130, run.tail()


async def finishing_workers(run: TinyRun) -> int:
    """Living workers that have finished rollouts."""
    async with run.broker() as broker:
        sessions = await broker.sessions()
    return sum(one["role"] == "worker" and int(one.get("finished", 0)) > 0 for one in sessions)


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
