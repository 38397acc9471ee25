"""Waits with a deadline, by a clock of the test's own; what the health endpoint makes of it."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from structlog.testing import capture_logs

from ringasync.config.load import load_config
from ringasync.observability.exporter import Exporter, exporting
from ringasync.observability.health import Health
from ringasync.observability.stalls import Awaited, StallClock
from tests.broker.test_tls import DEMO
from tests.observability.scrape import free_ports, scrape


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def awaited(sign: object = 0) -> Awaited:
    return Awaited("tokens", "the engine", "end this worker", str(sign))


def test_what_is_awaited_too_long_is_named_with_debtor_time_and_remedy() -> None:
    clock = Clock()
    stalls = StallClock(30, clock)
    with capture_logs() as logs:
        assert stalls.look({"a": awaited()}) == ""
        clock.now_s += 29
        assert stalls.look({"a": awaited()}) == ""
        clock.now_s += 1
        text = stalls.look({"a": awaited(), "b": awaited()})
        assert text == "30 s: tokens; owed by the engine; end this worker"
        clock.now_s += 29
        stalls.look({"a": awaited()})
        assert len(logs) == 1  # once in every 30 s
        clock.now_s += 1
        assert stalls.look({"a": awaited()}).startswith("60 s: ")
    assert [entry["event"] for entry in logs] == ["waiting too long"] * 2
    assert (logs[0]["owed_by"], logs[0]["since_s"]) == ("the engine", 30.0)
    assert logs[0]["remedy"] == "end this worker"


def test_progress_and_what_is_no_longer_awaited_begin_the_wait_anew() -> None:
    clock = Clock()
    stalls = StallClock(30, clock)
    stalls.look({"a": awaited(0)})
    clock.now_s += 40
    assert stalls.look({"a": awaited(0)}) != ""
    with capture_logs() as logs:
        assert stalls.look({"a": awaited(1)}) == ""
    assert logs[0]["event"] == "no longer waiting"
    clock.now_s += 29
    assert stalls.look({"a": awaited(1)}) == ""
    assert stalls.look({}) == ""
    clock.now_s += 29
    assert stalls.look({"a": awaited(1)}) == ""


def get(port: int, path: str) -> tuple[int, dict[str, Any]]:
    """Status and JSON of one path."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


async def test_a_role_answers_how_it_is_beside_its_metrics() -> None:
    port = free_ports()
    config = load_config(DEMO, [f"metrics.port={port}"])
    async with exporting(config, "worker", "w1") as exporter:
        port += 2
        assert get(port, "/healthz") == (
            200,
            {"run": "demo", "role": "worker", "worker": "w1", "doing": "starting", "stalls": []},
        )
        exporter.set({"doing": "generating", "active": 3, "stall": ""})
        code, said = get(port, "/healthz")
        assert (code, said["doing"], said["stalls"]) == (200, "generating", [])
        exporter.set({"doing": "generating", "active": 3, "stall": "31 s: tokens; owed by ..."})
        code, said = get(port, "/healthz")
        assert (code, said["stalls"]) == (503, ["31 s: tokens; owed by ..."])
        assert get(port, "/livez")[0] == 200  # a restart would not help it
        exporter.set({"step": 3})  # figures without a status change nothing
        assert get(port, "/healthz")[0] == 503
        assert any(sample.name == "ringasync_worker_active_rollouts" for sample in scrape(port))


def test_a_loop_that_hangs_is_told_from_outside() -> None:
    clock = Clock()
    health = Health({"role": "worker"}, 30, clock)
    health.say({"doing": "generating", "stall": True})
    clock.now_s += 29
    assert health.report() == (
        True,
        {"role": "worker", "doing": "generating", "stalls": [], "heartbeat_age_s": 29.0},
    )
    clock.now_s += 1
    alive, said = health.report()
    assert not alive
    assert said["stalls"][0].startswith("30 s: a heartbeat; owed by this process: its loop hangs")


def test_the_deadline_of_an_exporter_is_that_of_the_reports() -> None:
    assert Exporter("m", "worker", silent_after_s=7).health._silent_after_s == 7
