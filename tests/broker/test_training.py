"""Reserve, commit, mark trained, release, versions, staleness at reservation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ringasync.broker.types import TrainedTokens, VersionInfo
from ringasync.errors import FencedError, InvariantError, WeightError

from .kit import Kit, altered_scripts, payload


async def test_reserve_journal_commit_train(kit: Kit) -> None:
    await kit.ready("g1", "g2")
    ids = [group.group_id for group in await kit.broker.ready_groups(5)]
    groups, stale = await kit.broker.reserve(kit.learner, "b1", ids, 0, 3)
    assert stale == []
    assert [group.group_id for group in groups] == ["g1", "g2"]
    assert [rollout.reward for rollout in groups[0].rollouts] == [0.0, 1.0]
    assert groups[0].rollouts[0].segments == (payload(0, 4, 1),)
    assert await kit.broker.reserve(kit.learner, "b1", ids, 0, 3) == (groups, stale)
    assert await kit.broker.ready_groups(5) == []
    assert (await kit.broker.backlog()).reserved_tokens == 16
    assert await kit.broker.commit(kit.learner, "b1", {"g1": 2, "g2": 2})
    assert not await kit.broker.commit(kit.learner, "b1", {"g1": 2, "g2": 2})
    assert await kit.broker.client.exists(kit.broker.keys.segments("g1.0")) == 0
    assert await kit.check() == {"taken": 16}
    items = [TrainedTokens("g1", 8, 0, 0), TrainedTokens("g2", 4, 0, 1)]
    assert await kit.broker.mark_trained(kit.learner, "b1", items, 1)
    assert not await kit.broker.mark_trained(kit.learner, "b1", items, 1)
    assert await kit.check() == {"taken": 4, "trained": 12}
    assert await kit.group_state("g2") == "taken"
    await kit.broker.mark_trained(kit.learner, "b2", [TrainedTokens("g2", 3, 1, 0)], 2)
    assert await kit.check() == {"trained": 15, "masked": 1}
    assert await kit.broker.batches() == {"b1": "trained", "b2": "trained"}
    assert (await kit.broker.run_meta())["learner_step"] == "2"


async def test_release_puts_groups_back_in_their_order(kit: Kit) -> None:
    await kit.ready("g1")
    await kit.ready("g2")
    await kit.broker.reserve(kit.learner, "b1", ["g1"], 0, 3)
    assert [g.group_id for g in await kit.broker.ready_groups(5)] == ["g2"]
    assert await kit.broker.release(kit.learner, "b1")
    assert not await kit.broker.release(kit.learner, "b1")
    assert [g.group_id for g in await kit.broker.ready_groups(5)] == ["g1", "g2"]
    assert await kit.check() == {"graded": 16}
    assert await kit.broker.batches() == {}


async def test_what_is_not_ready_is_left_out(kit: Kit) -> None:
    await kit.ready("g1")
    await kit.feed("g2")
    groups, stale = await kit.broker.reserve(kit.learner, "b1", ["g2", "g1", "g9"], 0, 3)
    assert [group.group_id for group in groups] == ["g1"]
    assert stale == []
    other, _ = await kit.broker.reserve(kit.learner, "b2", ["g1"], 0, 3)
    assert other == []


async def test_commit_and_mark_trained_refuse_what_does_not_add_up(kit: Kit) -> None:
    await kit.ready("g1", "g2")
    await kit.broker.reserve(kit.learner, "b1", ["g1", "g2"], 0, 3)
    with pytest.raises(InvariantError, match="g2, which was not named"):
        await kit.broker.commit(kit.learner, "b1", {"g1": 2})
    with pytest.raises(InvariantError, match="not committed"):
        await kit.broker.mark_trained(kit.learner, "b1", [TrainedTokens("g1", 8, 0, 0)], 1)
    with pytest.raises(InvariantError, match="no batch b9"):
        await kit.broker.commit(kit.learner, "b9", {})
    await kit.broker.commit(kit.learner, "b1", {"g1": 2, "g2": 2})
    with pytest.raises(InvariantError, match="taken already"):
        await kit.broker.release(kit.learner, "b1")
    for wrong in (TrainedTokens("g1", 9, 0, 0), TrainedTokens("g1", 4, 1, 0)):
        good = TrainedTokens("g2", 8, 0, 0)
        with pytest.raises(InvariantError, match="tokens of group g1"):
            await kit.broker.mark_trained(kit.learner, "b1", [good, wrong], 1)
    assert await kit.check() == {"taken": 16}


async def test_groups_older_than_max_staleness_end_as_stale(kit: Kit) -> None:
    await kit.ready("g1", version=1)
    for version in (2, 3, 4):
        await kit.broker.publish(kit.learner, VersionInfo(version, version - 1, 0, "{}"))
    await kit.ready("g2", version=4)
    groups, stale = await kit.broker.reserve(kit.learner, "b1", ["g1", "g2"], 3, 2)
    assert stale == ["g1"]
    assert [group.group_id for group in groups] == ["g2"]
    assert await kit.broker.reserve(kit.learner, "b1", ["g1", "g2"], 3, 2) == (groups, stale)
    assert (await kit.broker.read_outcomes("0", 9))[-1].end == "stale"
    assert await kit.check() == {"stale": 8, "graded": 8}


async def test_a_broken_group_leaves_its_batch_as_quarantined(kit: Kit) -> None:
    await kit.ready("g1", "g2")
    await kit.broker.reserve(kit.learner, "b1", ["g1", "g2"], 0, 3)
    assert await kit.broker.end_group(kit.learner, "g1", "quarantined", "truncated msgpack")
    assert not await kit.broker.end_group(kit.learner, "g1", "quarantined", "again")
    assert await kit.broker.commit(kit.learner, "b1", {"g2": 2})
    with pytest.raises(InvariantError, match="g2 is taken by the learner"):
        await kit.broker.end_group(kit.learner, "g2", "purged", "no")
    assert await kit.check() == {"quarantined": 8, "taken": 8}


async def test_versions_rise_strictly_and_never_come_twice(kit: Kit) -> None:
    publish, learner = kit.broker.publish, kit.learner
    await publish(learner, VersionInfo(2, 1, 0, '{"a":1}'))
    await publish(learner, VersionInfo(2, 1, 0, '{"a":1}'))  # a retry of the same announcement
    for version in (2, 1):
        with pytest.raises(WeightError, match="not above the latest, 2"):
            await publish(learner, VersionInfo(version, 2, 0, '{"b":1}'))
    await publish(learner, VersionInfo(9, 4, 3, "{}"))
    assert await kit.broker.version() == VersionInfo(9, 4, 3, "{}")
    assert await kit.broker.version(2) == VersionInfo(2, 1, 0, '{"a":1}')
    assert await kit.broker.version(5) is None
    assert await kit.broker.version_steps() == {1: (0, 0), 2: (1, 0), 9: (4, 3)}
    for version in range(10, 14):
        await publish(learner, VersionInfo(version, version, 3, "{}"), keep=2)
    assert await kit.broker.version(11) is None
    assert await kit.broker.version(12) is not None
    assert 11 in await kit.broker.version_steps()


async def test_two_workers_against_a_version_block_publication(kit: Kit) -> None:
    for name in ("w1", "w1b", "w2"):
        await kit.broker.open_session(name, "worker", 5000, {"worker": name[:2]})
    assert await kit.broker.report_bad_version("w1", 1, "probe gap 3.2") == 1
    assert await kit.broker.report_bad_version("w1b", 1, "probe gap 3.2") == 1
    assert (await kit.broker.heartbeat("w1", 5000, {})).bad_versions == ()
    assert await kit.broker.report_bad_version("w2", 1, "probe gap 3.1") == 2
    assert await kit.broker.report_bad_version("w2", 1, "probe gap 3.1") == 2
    assert (await kit.broker.heartbeat("w1", 5000, {})).bad_versions == (1,)
    with pytest.raises(WeightError, match="blocked: version 1 failed on 2 workers"):
        await kit.broker.publish(kit.learner, VersionInfo(2, 1, 0, "{}"))
    await kit.broker.unblock_publication(kit.learner)
    await kit.broker.publish(kit.learner, VersionInfo(2, 1, 0, "{}"))
    assert (await kit.broker.heartbeat("w1", 5000, {})).bad_versions == (1,)


async def test_resume_lifts_the_block_that_bad_versions_set(kit: Kit) -> None:
    for name in ("w1", "w2"):
        await kit.broker.open_session(name, "worker", 5000, {"worker": name})
        await kit.broker.report_bad_version(name, 1, "probe gap 3.2")
    assert (await kit.broker.run_meta())["publication_blocked"]
    await kit.broker.set_paused(True)
    with pytest.raises(WeightError, match="blocked"):
        await kit.broker.publish(kit.learner, VersionInfo(2, 1, 0, "{}"))
    await kit.broker.set_paused(False)
    await kit.broker.publish(kit.learner, VersionInfo(2, 1, 0, "{}"))
    assert (await kit.broker.heartbeat("w1", 5000, {})).bad_versions == (1,)


async def test_a_learner_that_lost_its_lock_changes_nothing(kit: Kit) -> None:
    await kit.ready("g1")
    await kit.advance(60_000)
    new = await kit.broker.acquire_lock("learner", "l2", 5000)
    old = kit.learner
    assert new.token > old.token
    before = await kit.broker.backlog()
    calls = (
        kit.broker.reserve(old, "b1", ["g1"], 0, 3),
        kit.broker.release(old, "b1"),
        kit.broker.commit(old, "b1", {}),
        kit.broker.mark_trained(old, "b1", [], 1),
        kit.broker.force_taken(old, "b1", {"g1": (8, 2)}),
        kit.broker.publish(old, VersionInfo(2, 1, 0, "{}")),
        kit.broker.finish_round(old, 1),
        kit.broker.end_group(old, "g1", "quarantined", "no"),
        kit.broker.renew_lock(old, 5000),
    )
    for call in calls:
        with pytest.raises(FencedError, match="l2 holds token"):
            await call
    await kit.broker.release_lock(old)
    await kit.broker.renew_lock(new, 5000)
    assert await kit.broker.backlog() == before
    assert await kit.broker.batches() == {}


async def test_rollouts_without_a_token_are_trained_as_nothing(kit: Kit) -> None:
    await kit.ready("g1", tokens=2)
    await kit.feed("g2")
    await kit.session("w")
    for lease in await kit.broker.take("w", 2, 1):
        await kit.finish(lease, 0)
    await kit.grade(await kit.broker.take_grading("w", 2), [0.0, 1.0])
    groups, stale = await kit.broker.reserve(kit.learner, "b1", ["g1", "g2"], 10**6, 10**6)
    assert stale == []
    assert [rollout.segments for rollout in groups[1].rollouts] == [(), ()]
    await kit.broker.commit(kit.learner, "b1", {"g1": 2, "g2": 2})
    items = [TrainedTokens("g1", 0, 4, 0), TrainedTokens("g2", 0, 0, 0)]
    assert await kit.broker.mark_trained(kit.learner, "b1", items, 1)
    assert await kit.check() == {"masked": 4}


@pytest.fixture
def few_groups() -> Iterator[None]:
    """Scripts that keep three ended groups."""
    with altered_scripts(lambda _, text: text.replace(b"KEEP_GROUPS = 1024", b"KEEP_GROUPS = 3")):
        yield


@pytest.mark.usefixtures("few_groups")
async def test_ended_groups_stay_readable_in_a_bounded_number(kit: Kit) -> None:
    for number in range(5):
        await kit.ready(f"g{number}")
        await kit.broker.reserve(kit.learner, f"b{number}", [f"g{number}"], 0, 3)
        await kit.broker.commit(kit.learner, f"b{number}", {f"g{number}": 2})
        items = [TrainedTokens(f"g{number}", 8, 0, 0)]
        await kit.broker.mark_trained(kit.learner, f"b{number}", items, 1)
    assert [await kit.group_state(f"g{n}") for n in range(5)] == ["absent"] * 2 + ["trained"] * 3
    assert [await kit.state(f"g{n}.1") for n in (1, 2)] == ["absent", "taken"]
    assert await kit.broker.history("g1.0") == []
    assert (await kit.broker.history("g2.0"))[-1]["event"] == "taken"
    for name in (kit.broker.keys.rollout("g4.0"), kit.broker.keys.group("g4")):
        assert 3500 < await kit.broker.client.ttl(name) <= 3600
    assert await kit.check() == {"trained": 40}
