"""A rollback that nobody has noticed yet: no prompt is skipped."""

from __future__ import annotations

from pathlib import Path

from ringasync.broker.client import Broker
from ringasync.config.load import config_hash, resolved_json
from ringasync.coordinator.feeder import Feeder
from ringasync.coordinator.seat import Seat
from ringasync.runtime.shutdown import Shutdown
from tests.broker.snapshot import restore, snapshot
from tests.coordinator.crew import fed_indices, make_config, words_source


async def test_prompts_that_redis_lost_are_fed_before_those_behind_them(
    live: Broker, run_name: str, tmp_path: Path
) -> None:
    """Found by simulation: the feeder went on from its own cursor, beyond what Redis has."""
    config = make_config(tmp_path, run_name)
    await live.create_run(resolved_json(config), config_hash(config))
    seat = Seat(live, config, Shutdown())
    assert await seat.take()
    feeder = Feeder(seat, words_source(config))
    await feeder.restore()
    await feeder.feed(2)
    before = await snapshot(live)
    await feeder.feed(2)
    await restore(live, before)
    assert await feeder.feed(2) == []  # it is noticed, and tried again in the next turn
    await feeder.feed(2)
    assert sorted((await fed_indices(live)).values()) == [0, 1, 2, 3]
