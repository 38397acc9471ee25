"""A run in a real Redis, with text that means harm in every field, and `ringasync ui` on it."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from ringasync.broker.client import Broker
from ringasync.broker.types import NewGroup, Verdict, VersionInfo
from ringasync.config.load import config_hash, resolved_json
from ringasync.config.schema import Config
from tests.broker.kit import item

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">'"
STEPS = 24
GROUPS = 60
TTL_MS = 3_600_000


@dataclass(frozen=True)
class Answer:
    """What came back of one request."""

    status: int
    headers: dict[str, str]
    text: str


@dataclass(frozen=True)
class Site:
    """A served run."""

    url: str
    run: str
    redis_url: str
    process: subprocess.Popen[str]

    def get(self, path: str, method: str = "GET", host: str = "") -> Answer:
        """One request; redirects are not followed, and the path is sent as it stands."""
        where = urlsplit(self.url)
        connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=20)
        try:
            connection.request(method, path, headers={"Host": host} if host else {})
            answer = connection.getresponse()
            text = answer.read().decode()
            headers = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, headers, text)
        finally:
            connection.close()


def run_config(run: str) -> Config:
    """Settings of the run that is shown."""
    return Config.model_validate(
        {"run": {"name": run}, "data": {"tasks": [{"name": "sums", "kind": "mathematics"}]}}
    )


def group(number: int) -> NewGroup:
    """Two rollouts of a hostile prompt."""
    return NewGroup(
        group_id=f"g{number:06}",
        kind="train",
        domain=HOSTILE,
        prompt=HOSTILE,
        prompt_ids=(1, 2),
        task={},
        source_index=number,
        size=2,
        max_new_tokens=64,
        quarantine_reason="",
    )


async def fill(redis_url: str, run: str, password: str | None = None) -> None:
    """Groups open, one ready, one half parked; steps, sessions and a stall."""
    broker = await Broker.connect(redis_url, run, password=password)
    try:
        config = run_config(run)
        await broker.create_run(resolved_json(config), config_hash(config))
        coordinator = await broker.acquire_lock("coordinator", "c", TTL_MS)
        learner = await broker.acquire_lock("learner", "l", TTL_MS)
        await broker.publish(learner, VersionInfo(1, 0, 0, "{}"))
        groups = [group(number) for number in range(GROUPS)]
        assert await broker.feed(coordinator, "r1", groups, "c") == GROUPS
        await broker.open_session("w", "worker", TTL_MS, {"worker": f"worker-1 {HOSTILE}"})
        await broker.open_session("c", "coordinator", TTL_MS, {"worker": "coordinator"})
        await broker.heartbeat("w", TTL_MS, {"doing": f"generating {HOSTILE}", "tokens_per_s": 7})
        await broker.heartbeat("c", TTL_MS, {"doing": "", "stall": f"31 s: tokens; {HOSTILE}"})
        leases = await broker.take("w", 4, 1)
        await broker.append_many("w", [item(lease, 0, 8) for lease in leases])
        for lease in leases[:2]:
            await broker.finish_many("w", [(lease.rollout_id, lease.token, "stop", 8)])
        await broker.park_many("w", [(leases[2].rollout_id, leases[2].token, HOSTILE)])
        jobs = await broker.take_grading("w", 2)
        rewards = [float(job.rollout_id.endswith(".1")) for job in jobs]
        verdicts = [
            Verdict(job.rollout_id, job.token, reward, "", HOSTILE)
            for job, reward in zip(jobs, rewards, strict=True)
        ]
        assert await broker.grade_many("w", verdicts, 3, True, 8) == ["ok", "ok"]
        odd = {"rollout": HOSTILE, "text": "half a pair: \ud800", "reward": HOSTILE}
        await broker.client.lpush(broker.keys.samples, json.dumps(odd))
        for step in range(1, STEPS + 1):
            figures = {"train_reward": step / STEPS, "mask_rate": 0.001, "staleness_mean": 1.5}
            await broker.push_metrics("learner", {"step": step, "tokens_per_s": 1e3, **figures})
    finally:
        await broker.close()


@contextmanager
def serving(redis_url: str, run: str, **environment: str) -> Iterator[Site]:
    """`ringasync ui` in a process of its own."""
    command = [sys.executable, "-m", "ringasync", "ui", "--run", run, "--redis-url", redis_url]
    process = subprocess.Popen(
        [*command, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith(f"run {run}: http://127.0.0.1:"), line + process.stdout.read()
        yield Site(line.split()[2], run, redis_url, process)
    finally:
        process.kill()
        process.communicate()


@contextmanager
def filled(redis_url: str, run: str) -> Iterator[Site]:
    """The run of ``fill``, served."""
    asyncio.run(fill(redis_url, run))
    with serving(redis_url, run) as site:
        yield site
