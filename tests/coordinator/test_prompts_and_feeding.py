"""Prompts become groups: bad ones quarantined, held-out ones left out, none skipped or doubled."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest

from ringasync.broker.client import Broker
from ringasync.config.schema import Config
from ringasync.coordinator.app import Coordinator, Place
from ringasync.coordinator.feeder import Cursor, Feeder, checkpoint_position, may_feed
from ringasync.coordinator.prompts import PromptCursor, PromptSource, group_id
from ringasync.coordinator.seat import Seat
from ringasync.errors import CheckpointError, ConfigError, FencedError
from ringasync.runtime.shutdown import Shutdown
from ringasync.scheduling.watermark import DataPosition
from tests.coordinator.crew import (
    Crew,
    Word,
    Words,
    fed_indices,
    letters,
    make_config,
    words_source,
)


class Rows:
    """A finite source of given prompts; all of one domain."""

    def __init__(self, *prompts: str) -> None:
        self._words = prompts

    def problem(self, index: int) -> Word:
        """Row ``index``."""
        return Word(self._words[index], "rows", {})


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("", "empty"),
        ("  \n", "empty"),
        ("x" * 33, "33 tokens; model.max_model_len_tokens less sampling.max_new_tokens leaves"),
        ("lone \ud800 surrogate", "not UTF-8"),
    ],
    ids=["nothing", "blank", "too-long", "not-utf8"],
)
def test_a_prompt_that_cannot_be_used_is_quarantined_with_the_reason(
    config: Config, prompt: str, reason: str
) -> None:
    source = PromptSource(config, Rows(prompt, "good"), Words("held"), letters)
    group = source.train_group(0, "g0")
    assert group is not None
    assert reason in group.quarantine_reason
    assert (group.prompt, group.prompt_ids) == ("", ())
    good = source.train_group(1, "g1")
    assert good is not None
    assert (good.quarantine_reason, good.prompt_ids) == ("", tuple(map(ord, "good")))
    assert (good.size, good.max_new_tokens, good.source_index) == (2, 16, 1)


def test_longest_prompt_that_leaves_room_is_fine(config: Config) -> None:
    source = PromptSource(config, Rows("x" * 32), Words("held"), letters)
    group = source.train_group(0, "g0")
    assert group is not None
    assert group.quarantine_reason == ""


def test_a_tokenizer_that_makes_nothing_of_a_prompt(config: Config) -> None:
    source = PromptSource(config, Rows("a"), Words("held"), lambda _prompt: [])
    group = source.train_group(0, "g0")
    assert group is not None
    assert "no tokens" in group.quarantine_reason


def test_held_out_prompts_are_never_trained_on(config: Config) -> None:
    source = PromptSource(
        config, Rows("a", "held 0", "b", "held 7", "held 8"), Words("held"), letters
    )
    walk = PromptCursor(source, lambda _index: False, "")
    groups, index, ended = walk.collect(0, 10)
    assert [group.prompt for group in groups] == ["a", "b", "held 8"]  # the set is 8 prompts
    assert (index, ended) == (5, True)


def test_training_on_nothing_but_held_out_prompts_is_refused(config: Config) -> None:
    source = PromptSource(config, Words("held", 8), Words("held", 8), letters)
    endless = PromptSource(config, Words("held"), Words("held"), letters)
    walk = PromptCursor(source, lambda _index: False, "")
    assert walk.collect(0, 3) == ([], 8, True)
    endless_walk = PromptCursor(endless, lambda _index: False, "")
    assert [g.prompt for g in endless_walk.collect(0, 1)[0]] == ["held 8"]

    class Same:
        def problem(self, _index: int) -> Word:
            return Word("held 0", "same", {})

    with pytest.raises(ConfigError, match="held-out set"):
        PromptCursor(
            PromptSource(config, Same(), Words("held"), letters), lambda _index: False, ""
        ).collect(0, 1)


def test_bad_and_missing_held_out_rows_are_left_out(config: Config) -> None:
    held = Words("held", 6, bad=frozenset({2}))
    source = PromptSource(config, Words("train"), held, letters)
    groups = source.eval_groups("first")
    assert [group.group_id for group in groups] == [
        f"efirst-{index:04d}" for index in (0, 1, 3, 4, 5)
    ]
    assert {(group.kind, group.size) for group in groups} == {("eval", 1)}


def test_cursor_round_trip_and_group_ids() -> None:
    cursor = Cursor(7, 2, DataPosition().close([0, 1, 5]), ended=True)
    assert Cursor.from_json(cursor.to_json()) == cursor
    assert group_id(5, cursor.suffix) == "g000005r2"
    assert group_id(5, Cursor().suffix) == "g000005"
    with pytest.raises(CheckpointError, match="not a data cursor"):
        Cursor.from_json('{"next": 1}')


@pytest.fixture
async def seat(live: Broker, config: Config) -> Seat:
    """A seat taken on a new run."""
    await live.create_run("", "hash", "pipelined")
    seat = Seat(live, config, Shutdown())
    assert await seat.take()
    await seat.beat()
    return seat


async def test_a_new_feeder_goes_on_where_the_broker_says(seat: Seat, config: Config) -> None:
    first = Feeder(seat, words_source(config))
    await first.restore()
    assert await first.feed(3) == ["g000000", "g000001", "g000002"]
    second = Feeder(seat, words_source(config))
    await second.restore()
    assert await second.feed(2) == ["g000003", "g000004"]
    assert sorted((await fed_indices(seat.broker)).values()) == [0, 1, 2, 3, 4]


async def test_a_fenced_feeder_changes_nothing(seat: Seat, config: Config) -> None:
    feeder = Feeder(seat, words_source(config))
    await feeder.restore()
    await seat.broker.release_lock(seat.fence)
    await seat.broker.acquire_lock("coordinator", "other", 10_000)
    before = await seat.broker.data_cursor()
    with pytest.raises(FencedError):
        await feeder.feed(1)
    assert await seat.broker.data_cursor() == before
    assert await fed_indices(seat.broker) == {}


async def test_bad_rows_are_quarantined_and_move_the_cursor(seat: Seat, config: Config) -> None:
    bad = Words("train", None, bad=frozenset({1}))
    feeder = Feeder(seat, PromptSource(config, bad, Words("held"), letters))
    await feeder.restore()
    assert await feeder.feed(3) == ["g000000", "g000002"]
    group = await seat.broker.group("g000001")
    assert group is not None
    assert (group["state"], group["reason"]) == ("quarantined", "row 1 is broken")
    assert Cursor.from_json(await seat.broker.data_cursor()).next_index == 3


async def test_finite_data_end_and_stay_ended(seat: Seat, config: Config) -> None:
    feeder = Feeder(seat, words_source(config, size=5))
    await feeder.restore()
    assert len(await feeder.feed(99)) == 5
    assert feeder.data_ended
    assert await feeder.feed(1) == []
    again = Feeder(seat, words_source(config, size=5))
    await again.restore()
    assert again.data_ended


async def test_groups_that_a_rollback_brought_back_are_not_fed_twice(
    seat: Seat, config: Config
) -> None:
    feeder = Feeder(seat, words_source(config))
    await feeder.restore()
    await feeder.feed(2)
    client, keys = seat.broker.client, seat.broker.keys
    # Redis lost group 1 and the cursor; the learner's journal has put group 0 back.
    await client.delete(keys.group("g000001"), keys.rollout("g000001.0"), keys.rollout("g000001.1"))
    await client.srem(keys.live, "g000001")
    await client.hset(keys.meta, "cursor", Cursor().to_json())
    await feeder.restore()
    await feeder.feed(3)
    assert sorted((await fed_indices(seat.broker)).values()) == [0, 1, 2]


async def test_an_empty_redis_goes_on_from_the_checkpoint(seat: Seat, config: Config) -> None:
    before = Feeder(seat, words_source(config))
    await before.restore()
    await before.feed(6)
    folder = config.run_dir / "checkpoints" / "step00000002-f000001-l000001"
    folder.mkdir(parents=True)
    position = DataPosition().close([0, 1, 2, 4])
    (folder / "meta.json").write_text(json.dumps({"data_position": position.to_json()}))
    assert checkpoint_position(config.run_dir) == position
    await seat.broker.delete_run()
    await seat.broker.create_run("", "hash", "pipelined")
    assert await seat.take()
    after = Feeder(seat, words_source(config))
    await after.restore()
    assert await after.feed(3) == ["g000003r1", "g000005r1", "g000006r1"]


async def test_a_redis_that_forgot_the_very_first_feeding_is_fed_again(
    seat: Seat, config: Config
) -> None:
    """Found by simulation: with no cursor to go on from the feeder asked for ever."""
    feeder = Feeder(seat, words_source(config))
    await feeder.restore()
    await feeder.feed(2)
    await seat.broker.delete_run()
    await seat.broker.create_run("", "hash", "pipelined")
    assert await seat.take()
    assert await feeder.feed(2) == []  # finds out
    assert await feeder.feed(2) == ["g000000r1", "g000001r1"]


def test_the_newest_checkpoint_is_that_of_the_latest_life(tmp_path: Path) -> None:
    """A later life may have begun from an older step, e.g. after its journal was set aside."""
    names = ["step00000009-f000001-l000001", "step00000003-f000002-l000002"]
    names += ["step00000004-f000002-l000002", ".tmp-step00000005-f000002-l000003-x"]
    for index, name in enumerate(names):
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        position = DataPosition().close([index])
        (folder / "meta.json").write_text(json.dumps({"data_position": position.to_json()}))
    assert checkpoint_position(tmp_path) == DataPosition().close([2])


async def test_a_killed_first_feeding_is_not_taken_for_an_empty_redis(
    seat: Seat, config: Config
) -> None:
    await Feeder(seat, words_source(config)).restore()
    again = Feeder(seat, words_source(config))
    await again.restore()
    assert await again.feed(1) == ["g000000"]


def test_without_a_usable_checkpoint_everything_is_fed_again(tmp_path: Path) -> None:
    assert checkpoint_position(tmp_path) == DataPosition()
    folder = tmp_path / "checkpoints" / "step00000009-f000001-l000001"
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text("{")
    assert checkpoint_position(tmp_path) == DataPosition()


async def test_mass_quarantine_stops_feeding_and_says_why(
    tmp_path: Path, run_name: str, live: Broker
) -> None:
    config = make_config(tmp_path, run_name)
    await live.create_run("", "hash", "pipelined")
    seat = Seat(live, config, Shutdown())
    assert await seat.take()
    feeder = Feeder(
        seat, PromptSource(config, Words("t", None, frozenset(range(99))), Words("h"), letters)
    )
    await feeder.restore()
    await feeder.feed(20)
    backlog = await live.backlog()
    refusal = may_feed("running", False, backlog)
    assert refusal.startswith("quarantine breaker: ")
    assert "row 19 is broken" in refusal
    await live.set_paused(False)  # what `ringasync resume` does
    assert may_feed("running", False, await live.backlog()) == ""
    assert may_feed("running", True, backlog) == "paused by hand"
    assert may_feed("finishing", False, backlog) == "the run is finishing"


async def test_a_full_redis_leaves_the_cursor_and_is_tried_again(
    seat: Seat, config: Config
) -> None:
    feeder = Feeder(seat, words_source(config))
    await feeder.restore()
    client = seat.broker.client
    limit = (await client.config_get("maxmemory"))["maxmemory"] or "0"
    await client.config_set("maxmemory", "1")  # an empty Redis holds more
    try:
        assert await feeder.feed(2) == []
        assert feeder.redis_full
    finally:
        await client.config_set("maxmemory", limit)
    assert await feeder.feed(2) == []  # not before a second has passed
    feeder._full_until = time.monotonic()
    assert await feeder.feed(2) == ["g000000", "g000001"]
    assert not feeder.redis_full


async def test_a_refusal_that_is_not_repeated_is_over(seat: Seat, config: Config) -> None:
    feeder = Feeder(seat, words_source(config))
    await feeder.restore()
    seen = [feeder.redis_full]
    for refused_s_ago in (1.5, 2.5):  # feeding is tried again after one second
        feeder._full_until = time.monotonic() + 1.0 - refused_s_ago
        seen.append(feeder.redis_full)
    assert seen == [False, True, False]


@pytest.mark.parametrize("mode", ["pipelined", "rounds"])
async def test_data_that_end_finish_the_run(
    tmp_path: Path, run_name: str, redis_url: str, live: Broker, mode: str
) -> None:
    config = make_config(tmp_path, run_name, learner__steps=50, schedule__mode=mode)
    crew = Crew(live, config)
    coordinator = Coordinator(
        config,
        Place(redis_url, "none"),
        Shutdown(),
        source=lambda c, _model: words_source(c, size=21),
    )
    running = asyncio.create_task(coordinator.run())
    await crew.join()
    working = asyncio.create_task(crew.work())
    assert await asyncio.wait_for(running, 60) == 0
    await asyncio.wait_for(working, 10)
    summary = json.loads((config.run_dir / "summary.json").read_text())
    assert summary["tokens_trained"] == 21 * 2 * 8  # all of it, the last batch below the budget
    assert 5 <= summary["steps"] < 50
    assert summary["eval_reward_last"] is not None
