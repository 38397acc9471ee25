"""The supervisor with real child processes; only what they do is small."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from ringasync.runtime.process import RoleProcess, RoleSpec, describe_exit, thread_environment
from ringasync.runtime.shutdown import EXIT_INTERRUPTED, Shutdown
from ringasync.runtime.supervisor import EXIT_INCOMPLETE, RestartPolicy, Supervisor

FAST = RestartPolicy(max_restarts=3, window_s=60.0, backoff_s=0.02, backoff_max_s=0.1, settle_s=5.0)
DEADLINE_S = 20.0

DRAINS = """
    import signal, sys, threading
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    print("up", flush=True)
    while not stop.wait(0.05): pass
    print("drained", flush=True)
"""
STUBBORN = """
    import signal, threading
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("up", flush=True)
    threading.Event().wait()
"""


def role(
    name: str, source: str, *, drain_timeout_s: float = 10.0, essential: bool = False
) -> RoleSpec:
    code = textwrap.dedent(source)
    return RoleSpec(
        name, (sys.executable, "-I", "-c", code), essential, drain_timeout_s=drain_timeout_s
    )


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        await asyncio.sleep(0.02)


async def never_done() -> bool:
    return False


class Run:
    """A supervisor at work on ``specs``, with what it said."""

    def __init__(self, specs: list[RoleSpec], tmp_path: Path) -> None:
        self.said: list[str] = []
        self.done = False
        self.shutdown = Shutdown()
        self.log_dir = tmp_path / "logs"
        self.supervisor = Supervisor(specs, self.log_dir, say=self.said.append, policy=FAST)
        self.task = asyncio.create_task(self.supervisor.run(self.shutdown, self._is_done))

    async def _is_done(self) -> bool:
        return self.done

    def log(self, name: str) -> str:
        path = self.log_dir / f"{name}.log"
        return path.read_text() if path.exists() else ""

    async def end(self) -> int:
        return await asyncio.wait_for(self.task, DEADLINE_S)


async def test_killed_role_is_restarted_and_said(tmp_path: Path) -> None:
    run = Run([role("worker-1", DRAINS), role("learner", DRAINS)], tmp_path)
    await until(lambda: "up" in run.log("worker-1"))
    first = run.supervisor.running()["worker-1"]
    os.kill(first, signal.SIGKILL)
    await until(lambda: run.supervisor.running().get("worker-1", first) != first)
    assert any("worker-1" in line and "killed by SIGKILL" in line for line in run.said)
    await until(lambda: run.log("worker-1").count("up") == 2)
    run.done = True
    assert await run.end() == 0


async def test_done_run_drains_every_role_and_ends_with_0(tmp_path: Path) -> None:
    run = Run([role("worker-1", DRAINS), role("worker-2", DRAINS)], tmp_path)
    await until(lambda: "up" in run.log("worker-1") and "up" in run.log("worker-2"))
    pids = list(run.supervisor.running().values())
    run.supervisor._policy = RestartPolicy(settle_s=0.1)
    run.done = True
    assert await run.end() == 0
    assert "drained" in run.log("worker-1")
    assert "drained" in run.log("worker-2")
    assert not any(psutil.pid_exists(pid) for pid in pids)


async def test_requested_stop_drains_and_ends_with_130(tmp_path: Path) -> None:
    run = Run([role("worker-1", DRAINS)], tmp_path)
    await until(lambda: "up" in run.log("worker-1"))
    run.shutdown.request("SIGINT")
    assert await run.end() == EXIT_INTERRUPTED
    assert "drained" in run.log("worker-1")


async def test_role_deaf_to_sigterm_is_killed_after_its_drain_timeout(tmp_path: Path) -> None:
    run = Run([role("worker-1", STUBBORN, drain_timeout_s=0.3)], tmp_path)
    await until(lambda: "up" in run.log("worker-1"))
    pid = run.supervisor.running()["worker-1"]
    run.shutdown.request("SIGINT")
    assert await run.end() == EXIT_INTERRUPTED
    assert not psutil.pid_exists(pid)
    assert any("did not end within 0.3 s" in line for line in run.said)


@pytest.mark.parametrize("code", [2, 3, 7, 70])
async def test_hopeless_exit_is_not_restarted_and_shows_the_log(tmp_path: Path, code: int) -> None:
    failing = role("learner", f"print('the reason'); raise SystemExit({code})")
    run = Run([failing, role("worker-1", DRAINS)], tmp_path)
    assert await run.end() == code
    assert run.log("learner").count("the reason") == 1
    assert any("the reason" in line for line in run.said)


async def test_role_that_keeps_dying_ends_the_run_with_its_code(tmp_path: Path) -> None:
    run = Run([role("learner", "print('again'); raise SystemExit(6)")], tmp_path)
    assert await run.end() == 6
    assert run.log("learner").count("again") == 1 + FAST.max_restarts
    assert any("after 3 restarts" in line for line in run.said)


async def test_role_that_keeps_being_killed_gives_128_plus_signal(tmp_path: Path) -> None:
    run = Run([role("learner", "import os; os.kill(os.getpid(), 9)")], tmp_path)
    assert await run.end() == 128 + 9


async def test_role_that_left_in_peace_is_not_restarted(tmp_path: Path) -> None:
    run = Run([role("worker-2", "print('bye')"), role("learner", DRAINS, essential=True)], tmp_path)
    await until(lambda: any("worker-2 left" in line for line in run.said))
    assert list(run.supervisor.running()) == ["learner"]
    run.done = True
    assert await run.end() == 0
    assert run.log("worker-2").count("bye") == 1


async def test_run_whose_essential_roles_left_is_incomplete(tmp_path: Path) -> None:
    run = Run([role("learner", "", essential=True), role("worker-1", DRAINS)], tmp_path)
    assert await run.end() == EXIT_INCOMPLETE
    assert any("not done" in line for line in run.said)
    assert "drained" in run.log("worker-1")


async def test_children_of_a_killed_role_go_with_it(tmp_path: Path) -> None:
    parent = role(
        "worker-1",
        """
        import subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-I", "-c", "import time; time.sleep(600)"])
        print(f"child={child.pid}", flush=True)
        time.sleep(600)
        """,
    )
    run = Run([parent], tmp_path)
    await until(lambda: "child=" in run.log("worker-1"))
    child = int(run.log("worker-1").split("child=")[1].split()[0])
    os.kill(run.supervisor.running()["worker-1"], signal.SIGKILL)
    await until(lambda: not psutil.pid_exists(child) or is_zombie(child))
    run.shutdown.request("test over")
    await run.end()


def is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def test_kill_all_ends_everything_at_once(tmp_path: Path) -> None:
    run = Run([role("worker-1", STUBBORN), role("worker-2", STUBBORN)], tmp_path)
    await until(lambda: "up" in run.log("worker-1") and "up" in run.log("worker-2"))
    pids = list(run.supervisor.running().values())
    run.shutdown.request("SIGINT")
    run.supervisor.kill_all()
    await run.end()
    assert not any(psutil.pid_exists(pid) for pid in pids)


async def test_error_while_watching_leaves_no_process_behind(tmp_path: Path) -> None:
    supervisor = Supervisor([role("worker-1", DRAINS)], tmp_path, say=print, policy=FAST)
    log = tmp_path / "worker-1.log"

    async def broken() -> bool:
        await until(lambda: log.exists() and "up" in log.read_text())
        raise RuntimeError("the broker is gone")

    with pytest.raises(RuntimeError, match="broker is gone"):
        await supervisor.run(Shutdown(), broken)
    assert supervisor.running() == {}
    assert "drained" in log.read_text()


async def test_role_gets_its_environment_and_own_session(tmp_path: Path) -> None:
    source = "import os; print(os.environ['OMP_NUM_THREADS'], os.getsid(0) == os.getpid())"
    spec = RoleSpec(
        "worker-1", (sys.executable, "-I", "-c", source), environment=thread_environment(3)
    )
    process = await RoleProcess.start(spec, tmp_path)
    assert await process.wait() == 0
    assert process.log_tail() == "3 True"


def test_backoff_doubles_up_to_its_limit() -> None:
    policy = RestartPolicy(backoff_s=0.5, backoff_max_s=3.0)
    assert [policy.pause_s(n) for n in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]


async def test_restarts_outside_the_window_are_forgotten(tmp_path: Path) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 100.0  # every look is later than the whole window
        return now

    said: list[str] = []
    counter = tmp_path / "count"
    source = f"""
    from pathlib import Path
    file = Path({str(counter)!r})
    count = int(file.read_text()) + 1 if file.exists() else 1
    file.write_text(str(count))
    raise SystemExit(0 if count == 8 else 5)
    """
    spec = role("worker-1", source, essential=True)
    supervisor = Supervisor([spec], tmp_path, say=said.append, policy=FAST, clock=clock)
    assert await asyncio.wait_for(supervisor.run(Shutdown(), never_done), DEADLINE_S) == 1
    assert counter.read_text() == "8"


def test_exit_in_words() -> None:
    assert describe_exit(3) == "exit code 3"
    assert describe_exit(-9) == "killed by SIGKILL"
