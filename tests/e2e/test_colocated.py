"""A colocated run: learner and workers take turns on one device, whoever is killed meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_whole_run import check_finished
from tests.e2e.tiny_run import TinyRun, started, tiny_settings
from workers import token_trace

STEPS = 6
TURN = 5
"""The turn in which learner and worker are killed: the third; the first published version 1."""

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(420)]


def events(run: TinyRun, role: str) -> Iterator[dict[str, Any]]:
    """What all lives of a role logged, with ``at_ms``."""
    for file in run.run_dir.glob(f"logs/{role}-*.jsonl"):
        for line in file.read_text().splitlines():
            event = json.loads(line)
            yield event | {"at_ms": datetime.fromisoformat(event["timestamp"]).timestamp() * 1000}


def learners_turns(run: TinyRun) -> dict[int, tuple[float, float]]:
    """Turn -> when the first life had the device, when the last one logged that it left it."""
    taken: dict[int, float] = {}
    left: dict[int, float] = {}
    for event in events(run, "learner"):
        turn = int(event.get("turn", 0))
        if event["event"] == "device taken":
            since = event["at_ms"] - 1000 * event["onload_s"]
            taken[turn] = min(taken.get(turn, since), since)
        elif "handed back" in event["event"]:
            left[turn] = max(left.get(turn, 0.0), event["at_ms"])
    assert taken.keys() == left.keys(), (taken, left)
    return {turn: (taken[turn], left[turn]) for turn in sorted(taken)}


def sampled_ms(trace: Path) -> list[int]:
    """When each step of any engine sampled."""
    return [
        int(line.split()[0]) for file in trace.iterdir() for line in file.read_text().splitlines()
    ]


async def sleeping_worker(run: TinyRun, turn: int) -> int:
    """Process id of a worker that has said that it sleeps in this turn; 0 while there is none."""
    alive = run.role_pids("worker")
    async with run.broker() as broker:
        for row in await broker.sessions():
            if row.get("asleep_turn") == str(turn) and int(row.get("pid", 0)) in alive:
                return int(row["pid"])
    return 0


def test_a_worker_dies_asleep_and_the_learner_with_the_device(
    tmp_path: Path, tiny_model: Path
) -> None:
    settings = tiny_settings(
        tmp_path,
        tiny_model,
        schedule__mode="rounds",
        schedule__colocated=True,
        learner__steps=STEPS,
        eval__every_steps=2,
    )
    trace, once = tmp_path / "trace", tmp_path / "crashed"
    trace.mkdir()
    environment = {
        token_trace.ENV: str(trace),
        "RINGASYNC_CRASH_AT": f"device_taken:{TURN}@{once}",
    }
    with started(tmp_path, settings, **environment) as run:
        run.wait_until(once.exists, "the learner's death")
        run.wait_until(lambda: asyncio.run(sleeping_worker(run, TURN)) > 0, "a sleeping worker")
        killed = asyncio.run(sleeping_worker(run, TURN))
        os.kill(killed, signal.SIGKILL)
        assert run.wait(300) == 0, run.tail()
        check_finished(run, STEPS)
        turns = learners_turns(run)
        assert len(turns) >= STEPS + 1
        assert TURN in turns
        times = sampled_ms(trace)
        for turn, (taken, left) in turns.items():
            during = [at for at in times if taken <= at < left]
            assert not during, f"{len(during)} steps sampled in turn {turn}"
        between = [at for at in times if turns[1][1] <= at < turns[TURN][0]]
        assert between, "nothing was sampled between the learner's turns"
        woken = [event for event in events(run, "worker") if event["event"] == "awake"]
        assert len(woken) >= STEPS
        lines = (run.run_dir / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines]
        handed = [line["time_handover_s"] for line in steps if line["kind"] == "step"]
        assert all(seconds > 0 for seconds in handed[: TURN // 2 - 1])
