"""The end of a finite mixture: what the last turn fed is waited for."""

from __future__ import annotations

from pathlib import Path

from ringasync.broker.client import Broker
from ringasync.broker.types import VersionInfo
from ringasync.config.load import config_hash, resolved_json
from ringasync.coordinator.director import Director
from ringasync.coordinator.evaluation import Evaluator
from ringasync.coordinator.feeder import Feeder
from ringasync.coordinator.pipelined import PipelinedSchedule
from ringasync.coordinator.recorder import Recorder
from ringasync.coordinator.seat import Seat
from ringasync.coordinator.watchdog import Watchdog
from ringasync.runtime.shutdown import Shutdown
from tests.coordinator.crew import make_config, words_source


async def test_a_turn_that_feeds_the_last_prompts_does_not_end_the_run(
    live: Broker, run_name: str, tmp_path: Path
) -> None:
    """Found by simulation: what was open before the turn is not what is open after it."""
    config = make_config(tmp_path, run_name, eval__prompts=0)
    await live.create_run(resolved_json(config), config_hash(config))
    learner = await live.acquire_lock("learner", "test", 60_000)
    await live.publish(learner, VersionInfo(1, 0, 0, "{}"))
    seat = Seat(live, config, Shutdown())
    assert await seat.take()
    await seat.beat()
    recorder, source = Recorder(seat), words_source(config, size=1)
    recorder.open()
    feeder = Feeder(seat, source)
    await feeder.restore()
    director = Director(
        seat,
        feeder,
        Evaluator(seat, source, recorder),
        PipelinedSchedule(seat, feeder, []),
        Watchdog(seat),
    )
    for _ in range(4):
        assert not await director.turn()
    assert feeder.data_ended
    assert (await live.backlog()).open_groups == 1
    assert (await live.run_meta())["phase"] == "running"
    await live.set_phase(seat.fence, "finishing")  # and were it set all the same
    await seat.beat()
    assert not await director.turn()
    recorder.close()
