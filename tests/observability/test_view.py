"""The live view: what it shows of a snapshot, of a real run, and of text that means harm."""

from __future__ import annotations

import asyncio
import io
import time
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console, RenderableType

from ringasync.broker.client import Broker
from ringasync.broker.types import AuditReport, Backlog, NewGroup
from ringasync.config.schema import Config, DataConfig, RunConfig, TaskConfig
from ringasync.errors import BrokerUnreachableError
from ringasync.observability.plain import duration, human, printable
from ringasync.observability.record_views import (
    render_audit,
    render_failures,
    render_inspect,
    render_samples,
)
from ringasync.observability.snapshot import EvalMean, Snapshot, SnapshotReader
from ringasync.observability.view import live_view, render
from tests.conftest import RedisServer

BACKLOG = Backlog(
    **{name: 0 for name in Backlog.__slots__ if name != "paused_feeding"},
    paused_feeding="",
)
HOSTILE = "[red]x[/red] [/] [link=file:///]\x1b[2J\x07"


def _shown(renderable: RenderableType, width: int = 160, height: int = 60) -> str:
    console = Console(
        file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None
    )
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


async def _until_shown(console: Console, text: str) -> str:
    assert isinstance(console.file, io.StringIO)
    deadline = time.monotonic() + 20
    while text not in console.file.getvalue():
        assert time.monotonic() < deadline, f"{text!r} was never shown"
        await asyncio.sleep(0.01)
    return console.file.getvalue()


def _step(number: int, **more: Any) -> dict[str, Any]:
    return {"role": "learner", "step": number, "train_reward": number / 10, **more}


def _snapshot(**changes: Any) -> Snapshot:
    base = Snapshot(
        run="demo",
        steps_total=200,
        meta={"phase": "running", "paused": "0", "learner_step": "42", "latest_version": "43"},
        steps=(_step(1), _step(2, mask_rate=0.0123, staleness_max=2, tokens_per_s=12345.6)),
        evals=(EvalMean("first", 0.42, 256, 256),),
        backlog=BACKLOG,
        ledger={"open": 250, "trained": 750, "accepted": 1000},
        sessions=(
            {"role": "worker", "worker": "w-1", "doing": "generating", "age_ms": "120"},
            {"role": "worker", "worker": "w-2", "state": "late", "age_ms": "4800"},
        ),
        eta_s=187.0,
    )
    return replace(base, **changes)


def test_a_snapshot_shows_progress_reward_staleness_and_who_does_what() -> None:
    shown = _shown(render(_snapshot()))
    for expected in (
        "step 42/200",
        "3 min 7 s to go",
        "version 43",
        "0.420 (256/256)",
        "1.230%",
        "2 steps",
        "generating",
        "0.1 s ago",
        "4.8 s ago",
        "75.0%",
        "12.3k tokens/s",
        "worker w-1",
    ):
        assert expected in shown
    assert shown.index("w-2") < shown.index("w-1"), "late ones first"
    assert "stalled" not in shown


def test_stalls_are_shown_with_who_owes_what() -> None:
    row = {"role": "coordinator", "worker": "c", "stall": "waits for grading since 40 s"}
    meta = {"phase": "running", "publication_blocked": "2 workers refused version 7"}
    backlog = replace(BACKLOG, paused_feeding="32 of 64 groups quarantined")
    shown = _shown(render(_snapshot(sessions=(row,), meta=meta, backlog=backlog)))
    assert "coordinator c: waits for grading since 40 s" in shown
    assert "feeding is paused: 32 of 64" in shown
    assert "publication is blocked: 2 workers" in shown


def test_an_empty_run_and_a_crowd_can_be_drawn() -> None:
    empty = _snapshot(steps=(), evals=(), sessions=(), meta={}, ledger={}, eta_s=None)
    assert "nobody is here yet: roles take a while to start" in _shown(render(empty))
    drained = _shown(render(_snapshot(sessions=())))
    assert "nobody is here" in drained
    assert "yet" not in drained
    crowd = tuple({"role": "worker", "worker": f"w-{i}", "age_ms": "1"} for i in range(1000))
    shown = _shown(render(_snapshot(sessions=crowd)))
    assert "977 more" in shown


def _busy(**changes: Any) -> Snapshot:
    """A snapshot with something in every line."""
    step = {
        "loss": -0.0386,
        "gap_mean": 1.5e-07,
        "mask_rate": 0.001,
        "staleness_mean": 2.1,
        "staleness_max": 3,
        "budget_fill": 1.0,
        "response_length_mean": 47.0,
        "tokens_per_s": 123456.7,
    }
    roles = {"coordinator": "coordinator", "learner": "learner@host:2644", "worker": "worker-1"}
    doing = "waiting for the oldest group, which 3116 trained tokens have overtaken"
    sessions = tuple(
        {
            **{"role": role, "worker": name, "doing": doing, "policy_version": "31"},
            **{"leases": "16", "tokens_per_s": "1432.6", "age_ms": "100"},
        }
        for role, name in roles.items()
    )
    accounts = ("open", "finished", "graded", "taken", "trained", "masked", "stale", "eval")
    base = _snapshot(
        steps=tuple(_step(n, **step) for n in range(1, 30)),
        evals=(EvalMean("first", 0.5, 32, 32), EvalMean("step 20", 0.6, 7, 32)),
        ledger={"accepted": 80_000, **dict.fromkeys(accounts, 10_000)},
        ends={"ready": 261, "stale": 9},
        sessions=sessions,
    )
    return replace(base, **changes)


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_it_fits_any_width(width: int) -> None:
    lines = _shown(render(_busy()), width).splitlines()
    assert max(len(line) for line in lines) <= width


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40)])
def test_it_fits_the_terminals_that_people_have(width: int, height: int) -> None:
    shown = _shown(render(_busy()), width, height)
    assert len(shown.splitlines()) <= height
    for expected in (
        *("coordinator", "learner@host:2644", "worker-1", "waiting for the", "1432.6"),
        *("3 min 7 s to go", "version 43", "completed", "trained", "12.5%"),
    ):
        assert expected in shown


def test_a_low_terminal_shows_fewer_roles_and_says_so() -> None:
    crowd = tuple({"role": "worker", "worker": f"worker-{i}", "age_ms": "1"} for i in range(9))
    shown = _shown(render(_busy(sessions=crowd)), 80, 24)
    assert len(shown.splitlines()) <= 24
    assert "worker-0" in shown
    assert "more" in shown


def test_what_it_holds_does_not_move_the_panels() -> None:
    few, many = (_shown(render(one), 120).splitlines() for one in (_snapshot(), _busy()))
    assert few[1].count("learning") == 1
    assert [few[1].index(name) for name in ("learning", "queues", "tokens by")] == [
        many[1].index(name) for name in ("learning", "queues", "tokens by")
    ]


def test_hostile_text_is_shown_literally() -> None:
    session = {"role": HOSTILE, "worker": HOSTILE, "doing": HOSTILE, "stall": HOSTILE}
    snapshot = _snapshot(sessions=(session,), problem=HOSTILE, evals=(EvalMean(HOSTILE, 1, 1, 1),))
    sample = {"rollout": HOSTILE, "prompt": HOSTILE, "text": HOSTILE, "reward": 1.0}
    history = [{"t_ms": 1, "event": HOSTILE, "worker": HOSTILE, "why": HOSTILE}]
    report = AuditReport(False, 1, {"open": 1}, {"open": 2}, {"open": 1}, (HOSTILE,))
    for renderable in (
        render(snapshot),
        render_samples([sample]),
        render_inspect(HOSTILE, {"state": HOSTILE}, history, {"prompt": HOSTILE}),
        render_audit(report),
        render_failures([{"end": HOSTILE, "group": HOSTILE, "reason": HOSTILE}]),
    ):
        shown = _shown(renderable, 300)
        assert "[red]x[/red]" in shown
        assert "\x1b" not in shown
        assert "\x07" not in shown


def test_groups_that_went_wrong_are_counted_with_their_last_reasons() -> None:
    bad: list[dict[str, Any]] = [
        {"end": "quarantined", "group": f"g{i}", "lengths": [], "reason": f"row {i} is broken"}
        for i in range(8)
    ]
    bad.append({"end": "grade_error", "group": "g9", "lengths": [700, 800], "reason": "no JSON"})
    shown = _shown(render_failures(bad))
    assert "8 groups ended quarantined (0 tokens)" in shown
    assert "g7: row 7 is broken" in shown
    assert "row 2 is broken" not in shown
    assert "1 groups ended grade_error (1,500 tokens)" in shown
    assert "g9: no JSON" in shown
    assert "no group ended quarantined" in _shown(render_failures([]))


def test_inspect_tells_who_when_which_version_and_why() -> None:
    history = [
        {"t_ms": 1_000, "event": "leased", "worker": "w-1", "version": 3, "tokens": 0},
        {"t_ms": 3_500, "event": "parked", "worker": "w-1", "versions": "3-4", "why": "drain"},
        {"t_ms": 9_000, "event": "graded", "worker": "g", "reward": 0.5},
    ]
    shown = _shown(render_inspect("g1.0", {"state": "graded", "tokens": "64"}, history))
    for expected in ("g1.0", "w-1", "3-4", "drain", "2.5 s", "reward 0.5", "64"):
        assert expected in shown
    taken, ended = {"state": "taken"}, {"state": "trained"}
    assert "trained" not in _shown(render_inspect("g1.0", taken, [], {"state": "taken"}))
    assert "taken" not in _shown(render_inspect("g1.0", taken, [], ended))
    assert "nothing is known of g9.9" in _shown(render_inspect("g9.9", None, []))


def test_audit_says_balanced_or_where_not() -> None:
    good = AuditReport(True, 1234, {"open": 1234}, {"open": 1234})
    assert "balanced: 1,234 accepted tokens" in _shown(render_audit(good))
    bad = AuditReport(False, 9, {"open": 9}, {"open": 7}, {"open": -2}, ("g1.0 has no group",))
    shown = _shown(render_audit(bad))
    assert "OUT OF BALANCE" in shown
    assert "-2" in shown
    assert "g1.0 has no group" in shown


def test_numbers_and_text_as_people_read_them() -> None:
    assert [human(n) for n in (0, 3, 2.5, 9999, 12345, 1_234_567)] == [
        "0",
        "3",
        "2.5",
        "9999",
        "12.3k",
        "1.23M",
    ]
    assert [duration(s) for s in (5, 187, 3725)] == ["5 s", "3 min 7 s", "1 h 2 min"]
    assert printable("a\n\x1b", keep="\n") == "a\n\N{REPLACEMENT CHARACTER}"


def _config(run: str) -> Config:
    return Config(
        run=RunConfig(name=run), data=DataConfig(tasks=(TaskConfig(name="t", kind="jsonl"),))
    )


async def test_the_view_follows_a_real_run_until_it_is_done(
    any_redis: RedisServer, run_name: str
) -> None:
    broker = await Broker.connect(any_redis.url, run_name)
    await broker.create_run("", "h")
    await broker.open_session("s", "worker", 60_000, {"worker": "w-7"})
    fence = await broker.acquire_lock("coordinator", "test", 60_000)
    group = NewGroup("g000001", "train", "d", "p", (1,), {}, 0, 4, 8)
    await broker.feed(fence, "r", [group], "1")
    await broker.push_metrics("learner", {"step": 1, "train_reward": 0.25})
    console = Console(file=io.StringIO(), width=160, force_terminal=True, color_system=None)
    viewing = asyncio.create_task(
        live_view(broker, _config(run_name), asyncio.Event(), console=console)
    )
    assert "0.250" in await _until_shown(console, "w-7")
    await broker.set_phase(fence, "done")
    await asyncio.wait_for(viewing, 10)
    await broker.delete_run()
    await broker.close()


async def test_the_view_stops_when_told_and_needs_no_terminal(
    any_redis: RedisServer, run_name: str
) -> None:
    broker = await Broker.connect(any_redis.url, run_name)
    await broker.create_run("", "h")
    stop = asyncio.Event()
    console = Console(file=io.StringIO(), width=160)
    viewing = asyncio.create_task(live_view(broker, _config(run_name), stop, console=console))
    await _until_shown(console, "nobody is here yet")
    stop.set()
    await asyncio.wait_for(viewing, 5)
    await broker.delete_run()
    await broker.close()


async def test_metrics_and_evaluations_are_read_once(any_redis: RedisServer, run_name: str) -> None:
    broker = await Broker.connect(any_redis.url, run_name)
    await broker.create_run("", "h")
    reader = SnapshotReader(broker, _config(run_name))
    for step in range(1, 4):
        await broker.push_metrics("learner", {"step": step})
    await broker.push_metrics("worker", {"tokens": 1})
    first = await reader.read()
    await broker.push_metrics("learner", {"step": 4})
    second = await reader.read()
    assert [line["step"] for line in first.steps] == [1, 2, 3]
    assert [line["step"] for line in second.steps] == [1, 2, 3, 4]
    assert second.eta_s is not None
    await broker.delete_run()
    await broker.close()


async def test_a_redis_that_went_away_keeps_the_last_picture(
    any_redis: RedisServer, run_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = await Broker.connect(any_redis.url, run_name)
    await broker.create_run("", "h")
    console = Console(file=io.StringIO(), width=160, force_terminal=True, color_system=None)
    stop = asyncio.Event()
    viewing = asyncio.create_task(live_view(broker, _config(run_name), stop, console=console))
    await _until_shown(console, "nobody is here yet")

    async def gone(_self: object) -> Snapshot:
        raise BrokerUnreachableError("redis does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(SnapshotReader, "read", gone)
        await _until_shown(console, "redis does not answer")
        assert not viewing.done()
    stop.set()
    await asyncio.wait_for(viewing, 10)
    await broker.delete_run()
    await broker.close()
