"""``ringasync up`` on a real embedded Redis and real child processes; only the roles are small."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from ringasync.broker.client import Broker
from ringasync.config.load import config_hash
from ringasync.config.schema import Config
from ringasync.errors import JoinRefusedError, LockHeldError, RingError
from ringasync.runtime.process import RoleSpec
from ringasync.runtime.roles import Place
from ringasync.runtime.runfiles import read_record
from ringasync.runtime.shutdown import EXIT_INTERRUPTED, Shutdown
from ringasync.runtime.supervisor import RestartPolicy
from ringasync.runtime.up import Up, UpOptions

DEADLINE_S = 40.0
POLICY = RestartPolicy(max_restarts=3, backoff_s=0.05, backoff_max_s=0.2, settle_s=0.5)

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

COORDINATOR = """
import asyncio, sys
from pathlib import Path
from ringasync.broker.client import Broker
from ringasync.errors import RingError

url, finish = sys.argv[1], Path(sys.argv[2])

async def main():
    broker = await Broker.connect(url, "small")
    print("up", flush=True)
    while not finish.exists():
        await asyncio.sleep(0.05)
    fence = await broker.acquire_lock("coordinator", "test", 60000)
    await broker.set_phase(fence, "done")
    await broker.close()

asyncio.run(main())
"""
WORKER = """
import signal, threading
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
print("up", flush=True)
while not stop.wait(0.05): pass
print("drained", flush=True)
"""


class Harness:
    """A configuration in ``tmp_path`` and the small roles that run it."""

    def __init__(self, tmp_path: Path) -> None:
        self.run_dir = tmp_path / "runs" / "small"
        self.finish = tmp_path / "finish"
        self.config_path = tmp_path / "small.toml"
        (tmp_path / "model").mkdir()
        text = TEXT.format(runs=tmp_path / "runs", model=tmp_path / "model")
        self.config_path.write_text(text, encoding="utf-8")
        self.shutdown = Shutdown()
        self.places: list[Place] = []
        self.tasks: list[asyncio.Task[int]] = []

    def specs(self, config: Config, place: Place) -> list[RoleSpec]:
        self.places.append(place)
        python = (sys.executable, "-c")
        coordinator = (*python, textwrap.dedent(COORDINATOR), place.redis_url, str(self.finish))
        return [
            RoleSpec("coordinator", coordinator, essential=True),
            RoleSpec("worker-1", (*python, textwrap.dedent(WORKER))),
        ]

    def up(self, *overrides: str, fresh: bool = False) -> asyncio.Task[int]:
        options = UpOptions(self.config_path, overrides, fresh=fresh)
        command = Up(options, self.shutdown, make_specs=self.specs, policy=POLICY)
        self.tasks.append(asyncio.create_task(command.run()))
        return self.tasks[-1]

    def log(self, role: str) -> str:
        path = self.run_dir / "logs" / f"{role}.log"
        return path.read_text() if path.exists() else ""

    async def until_up(self, times: int = 1) -> None:
        await until(
            lambda: all(self.log(r).count("up") >= times for r in ("coordinator", "worker-1"))
        )


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        await asyncio.sleep(0.02)


@pytest.fixture
async def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Harness]:
    monkeypatch.delenv("RINGASYNC_REDIS_URL", raising=False)
    it = Harness(tmp_path)
    yield it
    it.shutdown.request("test over")  # a test that failed must not leave processes behind
    await asyncio.gather(*it.tasks, return_exceptions=True)


async def test_run_goes_from_nothing_to_done(
    harness: Harness, capsys: pytest.CaptureFixture[str]
) -> None:
    task = harness.up()
    await harness.until_up()
    url = harness.places[0].redis_url
    assert (harness.run_dir / "redis" / "redis.url").read_text().strip() == url
    broker = await Broker.connect(url, "small")
    meta = await broker.run_meta()
    record = read_record(harness.run_dir)
    assert record is not None
    assert record.config_hash == meta["config_hash"]
    await broker.close()
    harness.finish.touch()
    assert await asyncio.wait_for(task, DEADLINE_S) == 0
    assert "drained" in harness.log("worker-1")
    assert not (harness.run_dir / "redis" / "redis.url").exists()
    assert "run small: coordinator, worker-1" in capsys.readouterr().out


async def test_finished_run_says_so_and_starts_nothing(
    harness: Harness, capsys: pytest.CaptureFixture[str]
) -> None:
    harness.finish.touch()
    assert await asyncio.wait_for(harness.up(), DEADLINE_S) == 0
    started = harness.log("coordinator")
    assert await asyncio.wait_for(harness.up(), DEADLINE_S) == 0
    assert "run small is finished" in capsys.readouterr().out
    assert harness.log("coordinator") == started


async def test_fresh_begins_the_finished_run_again(harness: Harness) -> None:
    harness.finish.touch()
    assert await asyncio.wait_for(harness.up(), DEADLINE_S) == 0
    (harness.run_dir / "old.txt").touch()
    harness.finish.unlink()
    task = harness.up(fresh=True)
    await until(lambda: not (harness.run_dir / "old.txt").exists())
    await harness.until_up()
    harness.finish.touch()
    assert await asyncio.wait_for(task, DEADLINE_S) == 0


async def test_stopped_run_is_resumed_by_the_same_command(harness: Harness) -> None:
    task = harness.up()
    await harness.until_up()
    broker = await Broker.connect(harness.places[0].redis_url, "small")
    await broker.set_paused(True, "remember me")
    await broker.close()
    harness.shutdown.request("SIGINT")
    assert await asyncio.wait_for(task, DEADLINE_S) == EXIT_INTERRUPTED

    harness.shutdown = Shutdown()
    task = harness.up()
    await harness.until_up(2)
    broker = await Broker.connect(harness.places[1].redis_url, "small")
    assert (await broker.run_meta())["paused_why"] == "remember me"
    await broker.close()
    harness.finish.touch()
    assert await asyncio.wait_for(task, DEADLINE_S) == 0


async def test_another_configuration_is_refused_on_an_existing_run(harness: Harness) -> None:
    harness.finish.touch()
    assert await asyncio.wait_for(harness.up(), DEADLINE_S) == 0
    with pytest.raises(JoinRefusedError) as caught:
        await asyncio.wait_for(harness.up("learner.lr=0.5"), DEADLINE_S)
    assert caught.value.exit_code == 3


async def test_second_up_on_the_same_run_is_refused(harness: Harness) -> None:
    task = harness.up()
    await harness.until_up()
    with pytest.raises(LockHeldError, match=f"process {os.getpid()}"):
        await harness.up()
    harness.finish.touch()
    assert await asyncio.wait_for(task, DEADLINE_S) == 0


async def test_killed_redis_comes_back_at_the_same_address(
    harness: Harness, capsys: pytest.CaptureFixture[str]
) -> None:
    task = harness.up()
    await harness.until_up()
    url = harness.places[0].redis_url
    broker = await Broker.connect(url, "small")
    before = (await broker.run_meta())["server_run_id"]
    pid = redis_pid(url)
    os.kill(pid, signal.SIGKILL)
    await until(lambda: redis_pid(url) not in (0, pid))
    assert (await broker.run_meta())["server_run_id"] == before  # same data, another process
    await broker.close()
    harness.finish.touch()
    assert await asyncio.wait_for(task, DEADLINE_S) == 0
    assert "embedded Redis died" in capsys.readouterr().out


def redis_pid(url: str) -> int:
    """Process that listens at the URL's port, 0 if none does."""
    port = int(url.rsplit(":", 1)[1].split("/")[0])
    for connection in psutil.net_connections("tcp"):
        if connection.laddr and connection.laddr.port == port and connection.status == "LISTEN":
            return connection.pid or 0
    return 0


async def test_stop_while_redis_is_another_machines(harness: Harness) -> None:
    with pytest.raises(RingError, match="did not answer"):
        await asyncio.wait_for(
            harness.up("redis.url=redis://127.0.0.1:1/0", "redis.retry_budget_s=0.2"), DEADLINE_S
        )
    assert harness.places == []


def test_wrong_configuration_is_refused_before_anything_exists(tmp_path: Path) -> None:
    harness = Harness(tmp_path)
    options = UpOptions(harness.config_path, ("learner.lr=x",))
    with pytest.raises(RingError, match=r"learner\.lr"):
        Up(options, harness.shutdown)
    assert not harness.run_dir.exists()


def test_hash_of_the_record_is_that_of_the_configuration(tmp_path: Path) -> None:
    config = Up(UpOptions(Harness(tmp_path).config_path), Shutdown())._config
    assert len(config_hash(config)) == 16
