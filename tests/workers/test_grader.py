"""The grader with a real broker and real verifier processes: rewards, retries, broken records."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ringasync.broker.client import Broker
from ringasync.broker.types import AppendItem, Fence, NewGroup
from ringasync.config.load import config_hash, load_config
from ringasync.config.schema import Config
from ringasync.records.segment import encode_segment, policy_segment
from tests.conftest import RedisServer
from workers.grader import Grader, tokenizer_decoder

_DEADLINE_S = 20.0
_TTL_MS = 60_000
_CONFIG = """
[run]
name = "NAME"
dir = "DIR"
[redis]
url = "URL"
[[data.tasks]]
name = "t"
kind = "jsonl"
dataset = "unused.jsonl"
[schedule]
group_size = 2
[grader]
isolation = "off"
processes = 2
timeout_s = 2.0
memory_bytes = 536870912
max_attempts = 2
"""


def _decode(token_ids: Sequence[int]) -> str:
    return "".join(chr(token_id) for token_id in token_ids)


@pytest.fixture
def config_path(tmp_path: Path, any_redis: RedisServer, run_name: str) -> Path:
    """A run's configuration file that names a real Redis."""
    text = _CONFIG.replace("NAME", run_name).replace("URL", any_redis.url)
    path = tmp_path / "config.toml"
    path.write_text(text.replace("DIR", str(tmp_path)))
    return path


@pytest.fixture
def config(config_path: Path) -> Config:
    """The same, loaded."""
    return load_config(config_path, [])


@pytest.fixture
async def real_broker(any_redis: RedisServer, config: Config) -> AsyncIterator[Broker]:
    """A broker on a fresh run with the real clock and two sessions, ``w`` and ``g``."""
    broker = await Broker.connect(any_redis.url, config.run.name)
    await broker.create_run(config.model_dump_json(), config_hash(config))
    await broker.open_session("w", "worker", _TTL_MS, {"worker": "w"})
    await broker.open_session("g", "grader", _TTL_MS, {"worker": "g"})
    yield broker
    await broker.delete_run()
    await broker.close()


def _group(number: int, function: str, size: int = 2) -> NewGroup:
    task = {"verifier": f"python:tests.rewards.bad_verifiers:{function}", "answer": "ab"}
    return NewGroup(f"g{number:06d}", "train", "d", "p", (1, 2), task, number, size, 64)


async def _finish(broker: Broker, groups: Sequence[NewGroup], text: str = "ab") -> Fence:
    """Feed groups, generate ``text`` for every rollout and finish them."""
    fence = await broker.acquire_lock("coordinator", "test", _TTL_MS)
    await broker.feed(fence, "feed", groups, "1")
    leases = await broker.take("w", 100, 1)
    assert len(leases) == sum(group.size for group in groups)
    ids = [ord(letter) for letter in text]
    payload = encode_segment(policy_segment(0, 1, ids, [-0.5] * len(ids)))
    items = [
        AppendItem(lease.rollout_id, lease.token, 0, len(ids), len(ids), 1, payload)
        for lease in leases
    ]
    assert set(await broker.append_many("w", items)) == {"ok"}
    moves = [(lease.rollout_id, lease.token, "stop", len(ids)) for lease in leases]
    assert set(await broker.finish_many("w", moves)) == {"ok"}
    return fence


async def _until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + _DEADLINE_S
    while not await condition():
        assert time.monotonic() < deadline, "condition was never met"
        await asyncio.sleep(0.02)


async def _run_until(grader: Grader, condition: Callable[[], Any]) -> None:
    stop = asyncio.Event()
    running = asyncio.create_task(grader.run(stop))
    waiting = asyncio.create_task(_until(condition))
    await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
    stop.set()
    await asyncio.wait_for(running, _DEADLINE_S)
    await waiting


async def _ends(broker: Broker) -> dict[str, str]:
    return {outcome.group_id: outcome.end for outcome in await broker.read_outcomes("0", 100)}


async def test_groups_become_ready_filtered_or_errors(real_broker: Broker, config: Config) -> None:
    groups = [_group(1, "by_length"), _group(2, "good"), _group(3, "raises"), _group(4, "hang")]
    await _finish(real_broker, groups)
    grader = Grader(real_broker, config, _decode, lambda: "g")

    async def all_ended() -> bool:
        return len(await _ends(real_broker)) == 4

    await _run_until(grader, all_ended)
    assert await _ends(real_broker) == {
        "g000001": "ready",
        "g000002": "filtered",
        "g000003": "grade_error",
        "g000004": "grade_error",
    }
    outcomes = {o.group_id: o for o in await real_broker.read_outcomes("0", 100)}
    assert len(set(outcomes["g000001"].rewards)) == 2
    assert outcomes["g000002"].rewards == (0.5, 0.5)
    assert outcomes["g000003"].rewards == ()
    assert "no such answer" in outcomes["g000003"].reason
    assert "within 2 s" in outcomes["g000004"].reason
    assert (await real_broker.audit()).balanced
    assert grader.status()["grade_verdicts"] == 4
    stall = str(grader.status()["stall"])
    assert "bad_verifiers:hang' on g000004." in stall
    assert "within 2 s, killed" in stall


async def test_samples_hold_the_decoded_text(real_broker: Broker, config: Config) -> None:
    await _finish(real_broker, [_group(1, "by_length")], "hello")

    async def sampled() -> bool:
        return len(await real_broker.samples(10)) == 2

    await _run_until(Grader(real_broker, config, _decode, lambda: "g"), sampled)
    assert "hello" in json.dumps(await real_broker.samples(10))


async def test_broken_segments_and_tasks_are_quarantined_with_their_reason(
    real_broker: Broker, config: Config
) -> None:
    await _finish(real_broker, [_group(number, "good") for number in (1, 2, 3)])
    key = real_broker.keys.segments("g000001.0")
    redis: Any = real_broker.client
    await redis.lset(key, 0, (await redis.lindex(key, 0))[:-3])
    await redis.hset(real_broker.keys.group("g000003"), "task", '{"verifier": ')

    async def all_ended() -> bool:
        return len(await _ends(real_broker)) == 3

    await _run_until(Grader(real_broker, config, _decode, lambda: "g"), all_ended)
    ends = {"g000001": "quarantined", "g000002": "filtered", "g000003": "quarantined"}
    assert await _ends(real_broker) == ends
    reasons = {o.group_id: o.reason for o in await real_broker.read_outcomes("0", 9)}
    assert "cut short" in reasons["g000001"]
    assert "task is no JSON" in reasons["g000003"]


async def test_a_lost_session_pauses_the_grader_until_there_is_a_new_one(
    real_broker: Broker, config: Config
) -> None:
    await _finish(real_broker, [_group(1, "good")])
    session = ["gone"]
    grader = Grader(real_broker, config, _decode, lambda: session[0])
    stop = asyncio.Event()
    running = asyncio.create_task(grader.run(stop))

    async def noticed() -> bool:
        return grader.status()["lost_sessions"] == 1

    async def ended() -> bool:
        return bool(await _ends(real_broker))

    await _until(noticed)
    assert not await ended()
    session[0] = "g"
    await _until(ended)
    stop.set()
    await running


async def test_stopping_finishes_what_was_taken(real_broker: Broker, config: Config) -> None:
    await _finish(real_broker, [_group(1, "slow")])
    stop = asyncio.Event()
    grader = Grader(real_broker, config, _decode, lambda: "g")
    running = asyncio.create_task(grader.run(stop))

    async def taken() -> bool:
        return grader.status()["grade_jobs"] == 2

    await _until(taken)
    stop.set()
    await running
    assert await _ends(real_broker) == {"g000001": "filtered"}


async def test_cancelling_leaves_jobs_that_another_grader_finishes(
    real_broker: Broker, config: Config
) -> None:
    await _finish(real_broker, [_group(1, "slow")])
    grader = Grader(real_broker, config, _decode, lambda: "g")
    running = asyncio.create_task(grader.run(asyncio.Event()))

    async def taken() -> bool:
        return grader.status()["grade_jobs"] == 2

    async def ended() -> bool:
        return bool(await _ends(real_broker))

    await _until(taken)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await real_broker.close_session("g")
    await real_broker.open_session("g2", "grader", _TTL_MS, {"worker": "g2"})
    await _run_until(Grader(real_broker, config, _decode, lambda: "g2"), ended)
    assert (await real_broker.audit()).balanced


def test_the_decoder_leaves_special_tokens_out(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 2, "?": 3}, "?"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=bare, **special).save_pretrained(tmp_path)
    assert tokenizer_decoder(str(tmp_path))([1, 2, 0]).split() == ["a", "b"]


async def test_the_role_grades_in_a_process_of_its_own_and_drains(
    real_broker: Broker, config: Config, config_path: Path, tmp_path: Path
) -> None:
    test_the_decoder_leaves_special_tokens_out(tmp_path)
    await _finish(real_broker, [_group(1, "good")], "\x01\x02")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "workers.grader",
        str(config_path),
        "--model",
        str(tmp_path),
        stderr=PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )

    async def ended() -> bool:
        return bool(await _ends(real_broker))

    await _until(ended)
    assert {row["role"] for row in await real_broker.sessions()} == {"worker", "grader"}
    process.send_signal(signal.SIGTERM)
    _, errors = await asyncio.wait_for(process.communicate(), _DEADLINE_S)
    assert process.returncode == 0, errors.decode()
    assert {row["id"] for row in await real_broker.sessions()} == {"w", "g"}
    (log_file,) = (tmp_path / config.run.name / "logs").glob("grader-*.jsonl")
    assert json.loads(log_file.read_text().splitlines()[0])["role"] == "grader"


async def test_the_role_ends_with_the_run(
    real_broker: Broker, config_path: Path, tmp_path: Path
) -> None:
    fence = await real_broker.acquire_lock("coordinator", "test", _TTL_MS)
    await real_broker.set_phase(fence, "done")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "workers.grader", str(config_path), "--model", "unused", stderr=PIPE
    )
    _, errors = await asyncio.wait_for(process.communicate(), _DEADLINE_S)
    assert process.returncode == 0, errors.decode()
