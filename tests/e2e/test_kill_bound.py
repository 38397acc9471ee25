"""Workers killed with SIGKILL: how many tokens of each rollout have to be generated again.

The engine's thread writes down what it samples (``workers/token_trace.py``), the broker's history
says what Redis had accepted when the lease was lost. The difference is what was lost.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import cycle, islice
from pathlib import Path

import pytest

from tests.e2e.tiny_run import TinyRun, started, tiny_settings
from workers import token_trace

FLUSH_TOKENS = 32
KILLS = 4
WARM_TOKENS = 400
"""What a victim has generated before, so that its rollouts are of different lengths."""
STILL_LOOKS = 10
"""Looks at a trace that did not grow, 50 ms apart, after which the engine stands still."""

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(420)]


@dataclass(frozen=True)
class Victim:
    """A worker process and its session."""

    pid: int
    session: str


@dataclass(frozen=True)
class Lost:
    """One rollout of a killed worker: tokens that nobody has any more.

    ``on_trial`` of them were sampled before the canary of their version had passed.
    """

    rollout: str
    tokens: int
    on_trial: int


async def busy_worker(run: TinyRun) -> Victim | None:
    """A living worker in the middle of several rollouts."""
    alive = run.role_pids("worker")
    async with run.broker() as broker:
        for row in await broker.sessions():
            pid = int(row.get("pid", 0))
            is_warm = int(row.get("tokens_generated", 0)) >= WARM_TOKENS
            is_busy = is_warm and int(row.get("active", 0)) >= 4
            if is_busy and pid in alive:
                return Victim(pid, row["id"])
    return None


async def is_reaped(run: TinyRun, victim: Victim) -> bool:
    """Whether the coordinator has given the session's rollouts to others."""
    async with run.broker() as broker:
        return await broker.client.hget(broker.keys.session(victim.session), "state") == b"dead"


async def lost_leases(run: TinyRun, victim: Victim) -> dict[str, tuple[int, int]]:
    """Rollouts that the session had when it died: when it took them, tokens in Redis at its end."""
    found = {}
    async with run.broker() as broker:
        async for key in broker.client.scan_iter(match=broker.keys.history("*"), count=1000):
            rollout = key.decode().rpartition(":")[2]
            taken_ms = before = 0
            for entry in await broker.history(rollout):
                if entry.get("worker") != victim.session:
                    continue
                if entry["event"] == "leased":
                    taken_ms, before = entry["t_ms"], entry["tokens"]
                elif entry["event"] == "lost":
                    found[rollout] = (taken_ms, before + entry["tokens"])
    return found


def versions_taken_up(run: TinyRun, victim: Victim) -> dict[int, float]:
    """When each version had passed its canary there, in milliseconds."""
    lines = (run.run_dir / "logs" / f"worker-{victim.pid}.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines if "weights taken up" in line]
    return {
        event["version"]: datetime.fromisoformat(event["timestamp"]).timestamp() * 1000
        for event in events
    }


def measure(run: TinyRun, trace: Path, victim: Victim) -> list[Lost]:
    """What was lost of each rollout that the victim was generating."""
    leases = asyncio.run(lost_leases(run, victim))
    passed = versions_taken_up(run, victim)
    unsent = {rollout: [0, 0] for rollout in leases}
    for line in (trace / str(victim.pid)).read_text().splitlines():
        at_ms, rollout, tokens, version = line.split()
        taken_ms, accepted = leases.get(rollout, (0, 0))
        if rollout in leases and int(at_ms) >= taken_ms and int(tokens) > accepted:
            unsent[rollout][0] += 1
            unsent[rollout][1] += int(at_ms) < passed.get(int(version), float("inf"))
    return [Lost(rollout, *counts) for rollout, counts in unsent.items()]


@contextmanager
def frozen_redis(run: TinyRun, trace: Path, victim: Victim) -> Iterator[None]:
    """Stop Redis until the victim's engine stands still for want of a broker."""
    servers = run.redis_processes()
    assert servers, "no embedded Redis"
    sizes: list[int] = []

    def stands_still() -> bool:
        sizes.append((trace / str(victim.pid)).stat().st_size)
        return len(sizes) > STILL_LOOKS and sizes[-STILL_LOOKS] == sizes[-1]

    for server in servers:
        server.suspend()
    try:
        run.wait_until(stands_still, "an engine at a halt")
        yield
    finally:
        for server in servers:
            server.resume()


def kill(run: TinyRun, trace: Path, how: str) -> list[Lost]:
    """SIGKILL a busy worker; what was lost."""
    found: list[Victim] = []

    def is_there() -> bool:
        victim = asyncio.run(busy_worker(run))
        found.extend([victim] if victim else [])
        return bool(found)

    run.wait_until(is_there, "a busy worker")
    victim = found[0]
    if how == "frozen":
        with frozen_redis(run, trace, victim):
            os.kill(victim.pid, signal.SIGKILL)
    else:
        os.kill(victim.pid, signal.SIGKILL)
    run.wait_until(lambda: asyncio.run(is_reaped(run, victim)), "the session's end")
    return measure(run, trace, victim)


async def is_balanced(run: TinyRun) -> bool:
    """Whether the ledger recomputed from the records says what the counters say."""
    async with run.broker() as broker:
        return (await broker.audit()).balanced


def test_a_killed_worker_loses_at_most_two_flushes_of_each_rollout(
    tmp_path: Path, tiny_model: Path
) -> None:
    trace = tmp_path / "trace"
    trace.mkdir()
    settings = tiny_settings(
        tmp_path,
        tiny_model,
        learner__steps=400,
        schedule__budget={"tokens": 4096},
        sampling__max_new_tokens=200,
        model__max_model_len_tokens=240,
        worker__flush_tokens=FLUSH_TOKENS,
        worker__flush_ms=2000,
        worker__max_concurrent=8,
    )
    everything: list[Lost] = []
    with started(tmp_path, settings, **{token_trace.ENV: str(trace)}) as run:
        run.wait_until(lambda: any(trace.iterdir()), "a first token")
        for how in islice(cycle(["running", "frozen"]), KILLS):
            lost = kill(run, trace, how)
            print(
                f"{how}: {len(lost)} rollouts, tokens lost of each:",
                sorted(each.tokens for each in lost),
                f"of these on trial: {sum(each.on_trial for each in lost)}",
            )
            everything += lost
        assert asyncio.run(is_balanced(run))
        os.kill(run.process.pid, signal.SIGINT)
        assert run.wait(60) == 130, run.tail()
    assert any(each.tokens for each in everything), "nothing was in flight: nothing is shown"
    too_many = [each for each in everything if each.tokens - each.on_trial > 2 * FLUSH_TOKENS]
    assert too_many == []
