"""A learner process replays routed experts that came through Redis, also after a kill."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ..conftest import RedisServer
from .kit import Feeder, LearnerProcess, check_ledger, config_path, write_config
from .moe_kit import tiny_moe

REPLAY = """
[worker]
engine = "vllm"
[loss]
routing_replay = true
"""


@pytest.fixture
async def moe_feeder(
    any_redis: RedisServer, tmp_path: Path, run_name: str
) -> AsyncIterator[Feeder]:
    model = tmp_path / "moe"
    tiny_moe().save_pretrained(model)
    path = write_config(tmp_path, run_name, model, steps=3)
    path.write_text(path.read_text() + REPLAY)
    made = await Feeder.make(any_redis.url, path)
    made.routed_shape = (2, 2, 4)
    yield made
    await made.close()


async def test_rows_survive_redis_the_journal_and_a_kill(
    moe_feeder: Feeder, any_redis: RedisServer
) -> None:
    await moe_feeder.feed(3, versions=(1, 2))
    moe_feeder.routed_shape = None
    await moe_feeder.feed(6)  # of a worker that recorded nothing
    path = config_path(moe_feeder)
    killed = LearnerProcess.start(path, any_redis.url, crash_at="committed")
    assert await killed.wait() < 0, killed.log()
    learner = LearnerProcess.start(path, any_redis.url)
    try:
        assert await learner.wait() == 0, learner.log()
    finally:
        learner.stop()
    first, *_, last = await moe_feeder.metrics()
    assert first["routing_replayed_share"] == 1.0
    assert last["routing_replayed_share"] < 1.0
    for row in await moe_feeder.metrics():
        parts = row["tokens_routing_replayed"] + row["tokens_routing_unknown"]
        assert parts == row["tokens_trained"] == 120
    await check_ledger(moe_feeder, 3 * 120)
