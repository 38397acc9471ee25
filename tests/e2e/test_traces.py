"""A real run with a killed worker, and what a real OTLP collector was sent of it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("opentelemetry.sdk")

from ringasync.observability.lives import trace_id
from tests.e2e.tiny_run import TinyRun, started, tiny_settings
from tests.observability.otlp_receiver import Received, receiving

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

PARTS = {"queued", "generate", "grade", "wait for batch", "train"}


async def created_ms(run: TinyRun) -> str:
    async with run.broker() as broker:
        return (await broker.run_meta())["created_ms"]


async def leases_with_tokens(run: TinyRun) -> dict[int, int]:
    """Worker process ids, with how many rollouts each holds that have tokens in Redis."""
    found: Counter[int] = Counter()
    async with run.broker() as broker:
        owners = {row["id"]: int(row["pid"]) for row in await broker.sessions() if "pid" in row}
        for view in await broker.group_states(await broker.live_groups()):
            for rollout in view.rollouts:
                fields = await broker.rollout(rollout.id) or {}
                if fields.get("state") == "leased" and int(fields.get("progress", 0)) > 0:
                    found[owners.get(fields["worker"], 0)] += 1
    return found


def kill_a_busy_worker(run: TinyRun) -> None:
    """SIGKILL to a worker that holds rollouts with tokens in Redis."""
    victims: list[int] = []

    def is_busy() -> bool:
        if not (run.run_dir / "redis" / "redis.url").exists():
            return False
        held = asyncio.run(leases_with_tokens(run))
        victims[:] = [pid for pid in run.role_pids("worker") if held.get(pid, 0) >= 2]
        return bool(victims)

    run.wait_until(is_busy, "a worker that holds rollouts with tokens", 100)
    os.kill(victims[0], signal.SIGKILL)


def test_each_rollouts_life_is_one_trace_over_all_roles(tmp_path: Path, tiny_model: Path) -> None:
    with receiving() as receiver:
        settings = tiny_settings(
            tmp_path,
            tiny_model,
            grader__in_worker=False,
            learner__steps=5,
            eval__prompts=8,
            observability__traces=receiver.url,
        )
        with started(tmp_path, settings, OTEL_EXPORTER_OTLP_HEADERS="x-key=abc") as run:
            kill_a_busy_worker(run)
            created = asyncio.run(created_ms(run))
            assert run.wait(150) == 0, run.tail()
        summary, traces = run.summary(), receiver.by_trace()
    assert {headers.get("x-key") for headers in receiver.headers} == {"abc"}
    assert max(Counter(span.id for span in receiver.spans).values()) == 1
    tokens: Counter[str] = Counter()
    for trace, (root, *parts) in traces.items():
        rollout = str(root.attributes["ringasync.rollout"])
        assert trace == trace_id("tiny", created, rollout)
        assert (root.name, root.parent) == ("rollout", 0)
        assert {part.parent for part in parts} == {root.id}
        check_parts(root, parts)
        tokens[root.attributes["ringasync.end"]] += root.attributes["ringasync.tokens"]
    check_tokens(tokens, summary["tokens_by_account"])
    check_resumed(list(traces.values()))


def check_parts(root: Received, parts: list[Received]) -> None:
    """They fill the whole life, one after the other, each by the role that does such things."""
    assert {part.name for part in parts} <= PARTS
    assert (parts[0].begin_ns, parts[-1].end_ns) == (root.begin_ns, root.end_ns)
    assert all(earlier.end_ns == later.begin_ns for earlier, later in pairwise(parts))
    generated = [part for part in parts if part.name == "generate"]
    for part in generated:
        assert part.resource["service.name"] == "ringasync-worker"
        assert part.resource["service.instance.id"].startswith("worker-")
    made = sum(part.attributes.get("ringasync.tokens", 0) for part in generated)
    assert made == root.attributes["ringasync.tokens"]
    if root.attributes["ringasync.end"] == "trained":
        names = [part.name for part in parts]
        assert names[-4:] == ["generate", "grade", "wait for batch", "train"]
        services = [part.resource["service.name"].removeprefix("ringasync-") for part in parts]
        assert services[-4:] == ["worker", "grader", "learner", "learner"]
        assert parts[-3].attributes["ringasync.reward"] == pytest.approx(
            float(root.attributes["ringasync.reward"])
        )


def check_tokens(tokens: Counter[str], accounts: dict[str, int]) -> None:
    """No rollout that ended is missing: the traces' tokens are the ledger's."""
    assert tokens["evaluated"] == accounts["eval"]
    assert tokens["filtered"] == accounts["filtered"]
    assert tokens["stale"] == accounts["stale"]
    # Of a group whose surplus waits for a next batch some tokens are trained already.
    assert 0 < tokens["trained"] <= accounts["trained"] + accounts["masked"]


def check_resumed(lives: list[list[Received]]) -> None:
    """What the killed worker held went on elsewhere, from where Redis had it."""
    resumed = 0
    for _, *parts in lives:
        turns = [part for part in parts if part.name == "generate"]
        for before, after in pairwise(turns):
            if before.attributes["ringasync.outcome"] != "lost":
                continue
            assert before.is_error
            assert not after.is_error
            one, other = (turn.resource["service.instance.id"] for turn in (before, after))
            assert one != other
            if before.attributes["ringasync.tokens"]:
                resumed += 1
                assert after.attributes["ringasync.resumed_tokens"] > 0
    assert resumed > 0
