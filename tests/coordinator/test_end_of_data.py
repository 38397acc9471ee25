"""The end of a finite mixture: what the last turn fed is waited for."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from ringasync.broker.client import Broker
from ringasync.broker.types import Backlog, Fence, Poll, VersionInfo
from ringasync.config.load import config_hash, resolved_json
from ringasync.coordinator import recorder as recorder_module
from ringasync.coordinator.director import Director
from ringasync.coordinator.evaluation import Evaluator
from ringasync.coordinator.feeder import Feeder
from ringasync.coordinator.pipelined import PipelinedSchedule
from ringasync.coordinator.recorder import Recorder
from ringasync.coordinator.seat import Seat
from ringasync.coordinator.watchdog import Watchdog
from ringasync.runtime.shutdown import Shutdown
from tests.coordinator.crew import make_config, until, words_source


class CountingSeat(Seat):
    """Counts how often somebody asked for a fresh poll."""

    polls = 0

    async def fresh_poll(self) -> Poll:
        self.polls += 1
        return await super().fresh_poll()


async def seated(live: Broker, run_name: str, tmp_path: Path) -> tuple[CountingSeat, Recorder]:
    """A coordinator's seat in a new run, and its recorder, open."""
    config = make_config(tmp_path, run_name, eval__prompts=0)
    await live.create_run(resolved_json(config), config_hash(config))
    seat = CountingSeat(live, config, Shutdown())
    assert await seat.take()
    await seat.beat()
    recorder = Recorder(seat)
    recorder.open()
    return seat, recorder


async def publish_first(live: Broker) -> Fence:
    """Version 1 by a learner, whose lock comes back."""
    learner = await live.acquire_lock("learner", "test", 60_000)
    await live.publish(learner, VersionInfo(1, 0, 0, "{}"))
    return learner


async def directed(seat: Seat, recorder: Recorder, *, prompts: int) -> tuple[Feeder, Director]:
    """The director of a run with that many prompts, and its feeder."""
    source = words_source(seat.config, size=prompts)
    feeder = Feeder(seat, source)
    await feeder.restore()
    schedule = PipelinedSchedule(seat, feeder, [])
    evaluator = Evaluator(seat, source, recorder)
    return feeder, Director(seat, feeder, evaluator, schedule, Watchdog(seat))


async def test_a_turn_that_feeds_the_last_prompts_does_not_end_the_run(
    live: Broker, run_name: str, tmp_path: Path
) -> None:
    """Found by simulation: what was open before the turn is not what is open after it."""
    seat, recorder = await seated(live, run_name, tmp_path)
    await publish_first(live)
    feeder, director = await directed(seat, recorder, prompts=1)
    for _ in range(4):
        assert not await director.turn()
    assert feeder.data_ended
    assert (await live.backlog()).open_groups == 1
    assert (await live.run_meta())["phase"] == "running"
    await live.set_phase(seat.fence, "finishing")  # and were it set all the same
    await seat.beat()
    assert not await director.turn()
    recorder.close()


async def test_a_batch_that_is_taken_within_a_turn_is_waited_for(
    live: Broker, run_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by the chaos suite: the learner took the last batch after the turn's poll, and the run
    was done while it trained."""
    seat, recorder = await seated(live, run_name, tmp_path)
    learner = await publish_first(live)
    _, director = await directed(seat, recorder, prompts=0)
    await live.set_phase(seat.fence, "finishing")
    await seat.beat()
    backlog = live.backlog

    async def after_the_last_batch_was_taken() -> Backlog:
        await live.client.hset(live.keys.meta, "learner_step", "1")
        return await backlog()

    monkeypatch.setattr(live, "backlog", after_the_last_batch_was_taken)
    assert not await director.turn()
    monkeypatch.undo()
    assert not await director.turn()
    await live.publish(learner, VersionInfo(2, 1, 0, "{}"))
    assert await director.turn()
    assert seat.poll.learner_step == 1  # what the recorder waits for
    recorder.close()


async def test_the_data_have_not_ended_where_redis_lost_the_last_feeding(
    live: Broker, run_name: str, tmp_path: Path
) -> None:
    """Found by simulation: Redis lost its tail between the last feeding and the run's end."""
    config = make_config(tmp_path, run_name, eval__prompts=0)
    await live.create_run(resolved_json(config), config_hash(config))
    seat = Seat(live, config, Shutdown())
    assert await seat.take()
    feeder = Feeder(seat, words_source(config, size=2))
    await feeder.restore()
    before = await live.data_cursor()
    assert await feeder.feed(8)
    ended = [feeder.data_ended]
    after = await live.data_cursor()
    await live.client.hset(live.keys.meta, "cursor", before)
    assert not await feeder.finish()
    ended.append(feeder.data_ended)
    assert (await live.run_meta())["phase"] == "running"
    await live.client.hset(live.keys.meta, "cursor", after)
    await feeder.restore()
    ended.append(feeder.data_ended)
    assert ended == [True, False, True]
    assert await feeder.finish()
    assert (await live.run_meta())["phase"] == "finishing"


async def test_the_last_step_s_line_is_waited_for(
    live: Broker, run_name: str, tmp_path: Path
) -> None:
    """Found by the chaos suite: a learner publishes first and then tells how the step went."""
    seat, recorder = await seated(live, run_name, tmp_path)
    async with asyncio.TaskGroup() as group:
        finishing = group.create_task(recorder.finish(last_step=3))
        await until(lambda: bool(seat.polls) or finishing.done(), "a look for the line", 30)
        assert not finishing.done()
        await live.push_metrics("learner", {"step": 3, "train_reward": 0.5})
    assert set(recorder.history.steps) == {3}
    recorder.close()


async def test_a_line_that_died_with_its_learner_does_not_keep_the_run_from_ending(
    live: Broker, run_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "LAST_LINE_S", 0.3)
    _, recorder = await seated(live, run_name, tmp_path)
    await recorder.finish(last_step=3)
    assert not recorder.history.steps
    recorder.close()
