"""SIGKILL of the coordinator at every named point, takeover by a standby, a polite stop."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from ringasync.broker.client import Broker
from ringasync.config.schema import Config
from tests.coordinator.crew import (
    Child,
    Crew,
    assert_each_entry_once,
    fed_indices,
    make_config,
    metrics,
    until,
)


async def finish_with(
    config: Config, url: str, broker: Broker, working: asyncio.Task[None]
) -> None:
    """Start a fresh coordinator and let the run come to its end under it."""
    child = Child(config, url)
    assert await child.ended(60) == 0, child.text()
    await asyncio.wait_for(working, 10)
    fed = await fed_indices(broker)
    assert sorted(fed.values()) == list(range(len(fed)))
    lines = metrics(config)
    assert_each_entry_once(lines)
    ended = [
        line["group"] for line in lines if line["kind"] == "outcome" and line["end"] == "ready"
    ]
    assert len(ended) == len(set(ended))
    assert [line["label"] for line in lines if line["kind"] == "eval"] == ["first", "last"]
    assert (await broker.audit()).balanced
    evaluated = [
        line["group"]
        for line in lines
        if line["kind"] == "outcome" and line["group_kind"] == "eval"
    ]
    assert len(evaluated) == len(set(evaluated)) == 16  # 8 held-out prompts, first and last


@pytest.mark.parametrize("point", ["fed", "eval_fed", "recorded", "round_closed", "reaped"])
async def test_killed_at_a_point_the_next_life_goes_on_exactly(
    tmp_path: Path, run_name: str, redis_url: str, live: Broker, point: str
) -> None:
    mode = "rounds" if point == "round_closed" else "pipelined"
    config = make_config(tmp_path, run_name, schedule__mode=mode)
    child = Child(config, redis_url, crash_at=point)
    crew = Crew(live, config)
    await crew.join()
    if point == "reaped":
        await live.open_session("dies", "worker", 200, {"worker": "dies"})
        assert await child.ended() == -signal.SIGKILL, child.text()
    working = asyncio.create_task(crew.work())
    assert await child.ended() == -signal.SIGKILL, child.text()
    await finish_with(config, redis_url, live, working)


async def test_standby_takes_over_and_the_old_one_is_fenced(
    tmp_path: Path, run_name: str, redis_url: str, live: Broker
) -> None:
    config = make_config(tmp_path, run_name, learner__steps=6)
    first = Child(config, redis_url)
    crew = Crew(live, config)
    await crew.join()
    await until(lambda: (config.run_dir / "metrics.jsonl").exists(), "the first one's file")
    second = Child(config, redis_url)
    await until(lambda: "standing by" in second.text(), "the second one to stand by")
    assert "heartbeat_age_ms" in second.text()
    working = asyncio.create_task(crew.work())
    await until(lambda: crew.steps_trained >= 2, "two steps")
    os.kill(first.process.pid, signal.SIGSTOP)  # not dead: it will wake up as a zombie
    await until(lambda: "coordinator begins" in second.text(), "takeover")
    await until(lambda: crew.steps_trained >= 4, "steps under the second one")
    os.kill(first.process.pid, signal.SIGCONT)
    assert await first.ended() == 5, first.text()  # FencedError
    assert await second.ended(60) == 0, second.text()
    await asyncio.wait_for(working, 10)
    fed = await fed_indices(live)
    assert sorted(fed.values()) == list(range(len(fed)))
    assert_each_entry_once(metrics(config))
    assert (await live.audit()).balanced


async def test_sigterm_stops_feeding_and_hands_the_seat_on_at_once(
    tmp_path: Path, run_name: str, redis_url: str, live: Broker
) -> None:
    config = make_config(tmp_path, run_name)
    child = Child(config, redis_url)
    crew = Crew(live, config)
    await crew.join()
    await until(lambda: (config.run_dir / "metrics.jsonl").exists(), "the file")
    for _ in range(5):
        await crew.turn()
    assert await asyncio.to_thread(child.terminate) == 0, child.text()
    assert not any(row["role"] == "coordinator" for row in await live.sessions())
    await live.acquire_lock("coordinator", "test", 500)  # free: no expiry to wait for
    recorded = {line["id"] for line in metrics(config) if line.get("stream") == "outcomes"}
    assert {outcome.entry_id for outcome in await live.read_outcomes("0", 1000)} == recorded
    await finish_with(config, redis_url, live, asyncio.create_task(crew.work()))


async def test_second_signal_ends_it_at_once(
    tmp_path: Path, run_name: str, redis_url: str, live: Broker
) -> None:
    config = make_config(tmp_path, run_name)
    child = Child(config, redis_url)
    await until(lambda: (config.run_dir / "metrics.jsonl").exists(), "the start")
    os.kill(child.process.pid, signal.SIGSTOP)
    os.kill(child.process.pid, signal.SIGTERM)
    os.kill(child.process.pid, signal.SIGINT)
    os.kill(child.process.pid, signal.SIGCONT)
    assert await child.ended() == 130, child.text()
