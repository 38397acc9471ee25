"""The sandbox on this host: every try of ``escapes`` fails, and the pool goes on each time."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
import socket
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from ringasync.errors import VerifierCrashError, VerifierError, VerifierTimeoutError
from ringasync.rewards import isolation
from ringasync.rewards import pool as pool_module
from ringasync.rewards.isolation import Sandbox, find_sandbox
from ringasync.rewards.pool import Isolation, VerifierPool, _Child

MEMORY_BYTES = 512 << 20
LIMIT_S = 10.0
SHORT_LIMIT_S = 3.0
_DEADLINE_S = 10.0

_found = find_sandbox()
needs_sandbox = pytest.mark.skipif(isinstance(_found, str), reason=str(_found))


def task_of(function: str, module: str = "escapes") -> dict[str, Any]:
    """A task whose verifier is a function of ``escapes``, or of another module of this folder."""
    return {"verifier": f"python:tests.rewards.{module}:{function}", "answer": ""}


def isolated_pool(limit_s: float = LIMIT_S) -> VerifierPool:
    """One process of each kind."""
    return VerifierPool(1, limit_s, MEMORY_BYTES, isolation="required")


_before: set[psutil.Process] = set()
"""Children of this process when a test began: the session's Redis, say."""


@pytest.fixture(autouse=True)
def _others() -> None:
    _before.clear()
    _before.update(psutil.Process().children(recursive=True))


async def until_no_process_is_left() -> None:
    """A kill is a request: the kernel ends a sandbox's processes right after."""
    deadline = time.monotonic() + _DEADLINE_S
    while left := set(psutil.Process().children(recursive=True)) - _before:
        assert time.monotonic() < deadline, f"still there: {left}"
        await asyncio.sleep(0.01)


@pytest.fixture
async def pool() -> AsyncIterator[VerifierPool]:
    """One process of each kind, closed at the end; it must leave no process."""
    pool = isolated_pool()
    yield pool
    await pool.close()
    await until_no_process_is_left()


ESCAPES = (
    *("interfaces", "fork_bomb", "vfork_and_clone", "start_program", "fill_disk"),
    *("secrets", "hidden_memory", "trace", "mount"),
)


@needs_sandbox
async def test_every_escape_fails_in_the_form_for_containers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert isinstance(_found, Sandbox)
    without_proc = dataclasses.replace(_found, has_proc=False)
    monkeypatch.setattr(pool_module, "find_sandbox", lambda readable: without_proc)
    monkeypatch.setenv("RINGASYNC_REDIS_PASSWORD", "hunter2")
    pool = isolated_pool()
    try:
        for escape in ESCAPES:
            assert await pool.verify(task_of(escape), "") == 0.0, escape
        assert await pool.verify(task_of("has_proc"), "") == 0.0
        assert await pool.verify(task_of("good"), "") == 0.5
    finally:
        await pool.close()
    await until_no_process_is_left()


@needs_sandbox
def test_where_proc_is_forbidden_the_sandbox_goes_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ``bwrap`` that says no to ``--proc``, as a container's does, and else is the real one."""
    strict = tmp_path / "bwrap"
    strict.write_text(
        '#!/bin/sh\nfor word; do [ "$word" != --proc ] || exit 1; done\n'
        f'exec {shutil.which("bwrap")} "$@"\n'
    )
    strict.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    isolation._tried.cache_clear()
    try:
        found = find_sandbox()
    finally:
        isolation._tried.cache_clear()
    assert found == Sandbox(str(strict), has_proc=False)


@needs_sandbox
@pytest.mark.parametrize("escape", ESCAPES)
async def test_an_escape_fails_and_the_pool_goes_on(
    pool: VerifierPool, monkeypatch: pytest.MonkeyPatch, escape: str
) -> None:
    monkeypatch.setenv("RINGASYNC_REDIS_PASSWORD", "hunter2")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    assert await pool.verify(task_of(escape), "") == 0.0
    assert await pool.verify(task_of("good"), "") == 0.5


@needs_sandbox
@pytest.mark.parametrize(
    ("escape", "error", "complaint"),
    [
        ("balloon", VerifierCrashError, "memory limit"),
        ("busy_threads", VerifierTimeoutError, "gave no verdict"),
        ("endless_output", VerifierError, "garbage|another job|died|no verdict"),
    ],
)
async def test_a_glutton_is_stopped_and_replaced(
    escape: str, error: type[VerifierError], complaint: str
) -> None:
    pool = isolated_pool(SHORT_LIMIT_S)
    try:
        with pytest.raises(error, match=complaint):
            await pool.verify(task_of(escape), "")
        await until_no_process_is_left()
        assert await pool.verify(task_of("good"), "") == 0.5
        assert (pool.stats.starts, pool.stats.errors) == (2, 1)
    finally:
        await pool.close()


@pytest.mark.parametrize("mode", ["off", pytest.param("required", marks=needs_sandbox)])
async def test_a_flood_that_nobody_reads_does_not_hold_up_the_kill(
    monkeypatch: pytest.MonkeyPatch, mode: Isolation
) -> None:
    """asyncio's reader stops at a full buffer, and its ``wait`` waits for the end of the pipe."""
    kill = _Child.kill

    async def late(child: _Child) -> None:
        deadline = time.monotonic() + _DEADLINE_S
        while not child._stdout._paused:  # type: ignore[attr-defined]  # not in the stubs
            assert time.monotonic() < deadline, "the reader's buffer never filled"
            await asyncio.sleep(0.01)
        monkeypatch.setattr(_Child, "kill", kill)
        await child.kill()

    monkeypatch.setattr(_Child, "kill", late)
    pool = VerifierPool(1, SHORT_LIMIT_S, MEMORY_BYTES, isolation=mode)
    try:
        async with asyncio.timeout(3 * _DEADLINE_S):
            with pytest.raises(VerifierError):
                await pool.verify(task_of("endless_output"), "")
            await until_no_process_is_left()
            assert await pool.verify(task_of("good"), "") == 0.5
    finally:
        await pool.close()


@needs_sandbox
async def test_nothing_of_the_host_is_reached_by_network_or_socket(pool: VerifierPool) -> None:
    name = f"ringasync-test-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind("\0" + name)
        local.listen()
        port = str(server.getsockname()[1])
        assert await pool.verify(task_of("network"), port) == 0.0
        assert await pool.verify(task_of("abstract_socket"), name) == 0.0
    assert await pool.verify(task_of("good"), "") == 0.5


@needs_sandbox
async def test_files_outside_are_neither_written_nor_read(
    pool: VerifierPool, tmp_path: Path
) -> None:
    secret = tmp_path / "password"
    secret.write_text("hunter2")
    folders = [str(tmp_path), str(Path.home())]
    assert await pool.verify(task_of("write_outside"), "\n".join(folders)) == 0.0
    assert await pool.verify(task_of("read_outside"), str(secret)) == 0.0
    assert os.listdir(tmp_path) == [secret.name]
    assert await pool.verify(task_of("good"), "") == 0.5


@needs_sandbox
async def test_other_processes_are_neither_seen_nor_killed(pool: VerifierPool) -> None:
    sleeper = await asyncio.create_subprocess_exec("sleep", "600")
    try:
        victim = str(sleeper.pid)
        assert await pool.verify(task_of("see_processes"), victim) == 0.0
        # It may kill its own sandbox, which is an error; never the victim or us.
        with suppress(VerifierCrashError):
            assert await pool.verify(task_of("kill_parent"), victim) == 0.0
        assert psutil.Process(sleeper.pid).status() != psutil.STATUS_ZOMBIE
        assert await pool.verify(task_of("good"), "") == 0.5
    finally:
        sleeper.kill()
        await sleeper.wait()


@needs_sandbox
async def test_one_start_serves_many_and_the_built_in_exact_stays_outside(
    pool: VerifierPool,
) -> None:
    counts = [await pool.verify(task_of("count", "bad_verifiers"), "") for _ in range(5)]
    assert counts == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert await pool.verify({"verifier": "exact", "answer": "a"}, "a") == 1.0
    assert pool.stats.starts == 2


@needs_sandbox
async def test_a_cancelled_job_leaves_no_process_of_the_sandbox(pool: VerifierPool) -> None:
    assert await pool.verify(task_of("good"), "") == 0.5
    job = asyncio.create_task(pool.verify(task_of("hang", "bad_verifiers"), ""))
    await asyncio.sleep(0)
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    await until_no_process_is_left()
    assert await pool.verify(task_of("good"), "") == 0.5


@needs_sandbox
async def test_reasoning_gym_scores_inside(pool: VerifierPool) -> None:
    task = {"verifier": "reasoning_gym", "dataset": "basic_arithmetic", "row": 0, "seed": 1}
    plain = VerifierPool(1, 30.0, 2 << 30)
    verdict = await plain.verify(task, "no number")
    await plain.close()
    wide = VerifierPool(1, 30.0, 2 << 30, isolation="required")
    try:
        assert await wide.verify(task, "no number") == verdict
    finally:
        await wide.close()


@pytest.fixture
def no_bwrap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A host without bubblewrap."""
    isolation._tried.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.usefixtures("no_bwrap")
async def test_foreign_code_is_refused_where_it_must_and_cannot_be_isolated() -> None:
    pool = isolated_pool()
    try:
        with pytest.raises(VerifierCrashError, match=r"grader\.isolation.*not installed"):
            await pool.verify(task_of("good"), "")
        assert await pool.verify({"verifier": "exact", "answer": "a"}, "a") == 1.0
    finally:
        await pool.close()
        isolation._tried.cache_clear()


@pytest.mark.usefixtures("no_bwrap")
async def test_preferred_runs_without_and_says_so() -> None:
    pool = VerifierPool(1, LIMIT_S, MEMORY_BYTES, isolation="preferred")
    try:
        assert "not installed" in pool.not_isolated
        assert await pool.verify(task_of("good"), "") == 0.5
    finally:
        await pool.close()
        isolation._tried.cache_clear()


def test_a_bwrap_that_cannot_isolate_is_found_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in a container that forbids user namespaces: the program is there and fails."""
    program = tmp_path / "bwrap"
    program.write_text("#!/bin/sh\necho 'No permissions to create a new namespace' >&2\nexit 1\n")
    program.chmod(0o755)
    isolation._tried.cache_clear()
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    try:
        found = find_sandbox()
        assert isinstance(found, str)
        assert "does not isolate here (exit code 1): No permissions" in found
    finally:
        isolation._tried.cache_clear()
