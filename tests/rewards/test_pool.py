"""Verifiers that misbehave, in real processes: an error, never a zero, and the pool goes on."""

from __future__ import annotations

import asyncio
import os
import select
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from ringasync.errors import VerifierCrashError, VerifierTimeoutError
from ringasync.rewards.pool import VerifierPool

MEMORY_BYTES = 512 << 20
LIMIT_S = 5.0
SHORT_LIMIT_S = 2.0
_DEADLINE_S = 10.0


def task_of(function: str) -> dict[str, Any]:
    """A task whose verifier is a function of ``bad_verifiers``."""
    return {"verifier": f"python:tests.rewards.bad_verifiers:{function}", "answer": ""}


@pytest.fixture
async def pool() -> AsyncIterator[VerifierPool]:
    """One process."""
    pool = VerifierPool(1, LIMIT_S, MEMORY_BYTES)
    yield pool
    await pool.close()


@pytest.fixture
async def hasty_pool() -> AsyncIterator[VerifierPool]:
    """One process with a short time limit."""
    pool = VerifierPool(1, SHORT_LIMIT_S, MEMORY_BYTES)
    yield pool
    await pool.close()


def _process_ids() -> set[int]:
    """Verifier processes of this test that still run."""
    found = set()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "ringasync.rewards.child" in child.cmdline():  # a zombie has no command line
                found.add(child.pid)
    return found


async def _until(condition: Callable[[], bool], pause_s: float = 0.01) -> None:
    deadline = time.monotonic() + _DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "condition was never met"
        await asyncio.sleep(pause_s)


async def test_verdicts_are_floats_from_one_lasting_process(pool: VerifierPool) -> None:
    assert await pool.verify(task_of("good"), "x") == 0.5
    assert await pool.verify(task_of("truth"), "x") == 1.0
    assert [await pool.verify(task_of("count"), "") for _ in range(3)] == [1.0, 2.0, 3.0]
    assert (pool.stats.starts, pool.stats.kills, pool.stats.verdicts) == (1, 0, 5)


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        ("raises", "ValueError: no such answer"),
        ("nan", "nan is not a finite number"),
        ("infinite", "inf is not a finite number"),
        ("nothing", "None is not a finite number"),
        ("text", "'1.0' is not a finite number"),
        ("leak", "memory limit"),
        ("write", "File too large"),
        ("fork", "must not start processes"),
        ("native_fork", "left processes behind"),
        ("spawn", "must not start processes"),
        ("leave", "SystemExit: 3"),
        ("exit_at_once", "exit code 5"),
        ("crash", "SIGSEGV"),
        ("recurse", "RecursionError"),
        ("corrupt", "garbage|another job|died"),
        ("absent", "absent"),
    ],
)
async def test_a_bad_verifier_is_an_error_and_the_pool_goes_on(
    pool: VerifierPool, tmp_path: Path, function: str, complaint: str
) -> None:
    with pytest.raises(VerifierCrashError, match=complaint):
        await pool.verify(task_of(function), str(tmp_path / "file"))
    assert await pool.verify(task_of("good"), "x") == 0.5
    assert pool.stats.errors == 1


@pytest.mark.parametrize("function", ["hang", "burn"])
async def test_a_verifier_that_never_answers_is_killed_at_its_limit(
    hasty_pool: VerifierPool, function: str
) -> None:
    pool = hasty_pool
    assert await pool.verify(task_of("good"), "x") == 0.5
    before = _process_ids()
    began = time.monotonic()
    with pytest.raises(VerifierTimeoutError, match="within 2 s"):
        await pool.verify(task_of(function), "x")
    assert SHORT_LIMIT_S <= time.monotonic() - began < SHORT_LIMIT_S + 10
    assert not before & _process_ids()
    assert await pool.verify(task_of("good"), "x") == 0.5
    assert (pool.stats.starts, pool.stats.kills) == (2, 1)


async def test_processes_that_a_verifier_hid_in_other_sessions_are_killed_too(
    hasty_pool: VerifierPool, tmp_path: Path
) -> None:
    fifo = tmp_path / "ids"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(VerifierTimeoutError):
            await hasty_pool.verify(task_of("fork_away_and_hang"), str(fifo))
        process_ids = [int(line) for line in os.read(reader, 4096).split()]
    finally:
        os.close(reader)
    assert len(process_ids) == 2
    await _until(lambda: not any(_runs(process_id) for process_id in process_ids))


def _runs(process_id: int) -> bool:
    try:
        return psutil.Process(process_id).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def test_prints_do_not_corrupt_frames(
    pool: VerifierPool, capfd: pytest.CaptureFixture[str]
) -> None:
    assert await pool.verify(task_of("chatter"), "x") == 0.25
    assert await pool.verify(task_of("good"), "x") == 0.5
    assert pool.stats.starts == 1
    assert capfd.readouterr() == ("", "")


async def test_a_child_that_died_idle_costs_the_next_job_nothing(pool: VerifierPool) -> None:
    assert await pool.verify(task_of("good"), "x") == 0.5
    (child,) = _process_ids()
    psutil.Process(child).kill()
    await _until(lambda: child not in _process_ids())
    assert await pool.verify(task_of("good"), "x") == 0.5
    assert pool.stats.errors == 0


async def test_an_alarm_left_behind_does_not_hit_the_next_job(pool: VerifierPool) -> None:
    assert [await pool.verify(task_of("armed"), "x") for _ in range(3)] == [1.0] * 3
    assert pool.stats.starts == 1


async def test_a_cancelled_job_does_not_answer_the_next(pool: VerifierPool) -> None:
    assert await pool.verify(task_of("good"), "x") == 0.5
    job = asyncio.create_task(pool.verify(task_of("hang"), "x"))
    await asyncio.sleep(0)
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    assert await pool.verify(task_of("truth"), "x") == 1.0


async def test_odd_text_reaches_the_verifier(pool: VerifierPool) -> None:
    for response in ("", "\x00", "\ud800 lone surrogate", "ü𝄞", "x" * 300_000):
        assert await pool.verify(task_of("good"), response) == 0.5


async def test_verifiers_see_no_secrets(
    pool: VerifierPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RINGASYNC_REDIS_PASSWORD", "secret")
    assert await pool.verify(task_of("secrets"), "x") == 0.0


async def test_a_hanging_verifier_blocks_one_process_of_two() -> None:
    pool = VerifierPool(2, LIMIT_S, MEMORY_BYTES)
    try:
        await asyncio.gather(*(pool.verify(task_of("good"), "x") for _ in range(2)))
        stuck = asyncio.create_task(pool.verify(task_of("hang"), "x"))
        verdicts = [await pool.verify(task_of("good"), "x") for _ in range(20)]
        assert verdicts == [0.5] * 20
        assert not stuck.done()
        with pytest.raises(VerifierTimeoutError):
            await stuck
    finally:
        await pool.close()


async def test_closing_leaves_no_process_and_fails_what_waits() -> None:
    pool = VerifierPool(2, 30.0, MEMORY_BYTES)
    jobs = [asyncio.create_task(pool.verify(task_of("hang"), "x")) for _ in range(2)]
    await _until(lambda: pool.stats.starts == 2)
    await pool.close()
    for outcome in await asyncio.gather(*jobs, return_exceptions=True):
        assert isinstance(outcome, VerifierCrashError)
    assert _process_ids() == set()
    with pytest.raises(VerifierCrashError, match="closed"):
        await pool.verify(task_of("good"), "x")


@pytest.mark.parametrize("turns", range(6))
async def test_closing_between_two_frames_fails_what_waits(turns: int) -> None:
    """The job would read its next frame where the closing has begun to read what is left."""
    pool = VerifierPool(1, 30.0, MEMORY_BYTES)
    job = asyncio.create_task(pool.verify(task_of("hang"), "x"))
    await _until(lambda: pool.stats.starts == 1, pause_s=0)  # before the next frame can be there
    pipe = next(iter(pool._alive))._process._transport.get_pipe_transport(1)  # type: ignore[attr-defined]
    assert select.select([pipe.get_extra_info("pipe")], [], [], _DEADLINE_S)[0]  # loop stands still
    for _ in range(turns):
        await asyncio.sleep(0)
    await pool.close()
    with pytest.raises(VerifierCrashError, match=r"died|closed"):
        await job
    assert _process_ids() == set()


async def test_the_pool_is_fast_enough_to_stay_out_of_the_way(
    record_property: Callable[[str, object], None],
) -> None:
    pool = VerifierPool(1, 5.0, MEMORY_BYTES)
    try:
        await pool.verify(task_of("good"), "x" * 400)
        began = time.monotonic()
        for _ in range(300):
            await pool.verify(task_of("good"), "x" * 400)
        verdicts_per_s = 300 / (time.monotonic() - began)
        record_property("start_s", pool.stats.start_s)
        record_property("verdicts_per_s", verdicts_per_s)
        print(f"start {pool.stats.start_s:.3f} s, {verdicts_per_s:.0f} verdicts/s")
        assert verdicts_per_s > 100
    finally:
        await pool.close()
