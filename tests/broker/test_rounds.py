"""Rounds, retention, purge, the backlog and the quarantine breaker."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ringasync.broker.client import Broker
from ringasync.errors import FencedError, InvariantError

from .kit import TTL_MS, Kit, new_group


@pytest.fixture
async def rounds(broker: Broker) -> Kit:
    """As ``kit``, on a run in rounds mode."""
    await broker.delete_run()
    await broker.create_run("", "testhash", mode="rounds")
    await broker.client.set(broker.keys.sim_now, 1_000_000)
    return await Kit.make(broker)


async def retention(kit: Kit, rollout_id: str) -> str:
    """A rollout's retention as stored."""
    fields = await kit.broker.rollout(rollout_id)
    assert fields is not None
    return fields["retention"]


async def test_a_round_from_open_to_the_next(rounds: Kit) -> None:
    kit, broker = rounds, rounds.broker
    await kit.feed("g1", size=3)
    await kit.session("w")
    assert await broker.take("w", 3, 1) == []
    await broker.open_round(kit.coordinator, "o1", 1)
    await broker.open_round(kit.coordinator, "o1", 1)
    first, second = await broker.take("w", 2, 1)
    await kit.append(first, 0, 6)
    await kit.append(second, 0, 4)
    await kit.finish(second, 4)
    backlog = await broker.backlog()
    assert (backlog.generated_tokens_round, backlog.finished_tokens_round) == (10, 4)
    assert (backlog.open_rollouts, backlog.running_rollouts, backlog.queued_tickets) == (2, 1, 1)
    assert await broker.close_round(kit.coordinator, "c1", 1) == 2
    assert await broker.close_round(kit.coordinator, "c1", 1) == 2
    assert await broker.close_round(kit.coordinator, "other", 1) == 0
    assert [await retention(kit, f"g1.{i}") for i in range(3)] == ["1", "0", "1"]
    poll = await broker.heartbeat("w", TTL_MS, {})
    assert (poll.round_id, poll.round_state) == (1, "closing")
    assert await broker.take("w", 3, 1) == []
    assert not await broker.round_to_training(kit.coordinator, 1)
    assert await kit.park(first, "round closed") == "ok"
    assert await broker.round_to_training(kit.coordinator, 1)
    assert await broker.round_to_training(kit.coordinator, 1)
    assert (await broker.heartbeat("w", TTL_MS, {})).round_state == "training"
    await broker.finish_round(kit.learner, 1)
    await broker.finish_round(kit.learner, 1)
    assert await broker.round_to_training(kit.coordinator, 1)  # again, for its answer was lost
    assert (await broker.heartbeat("w", TTL_MS, {})).round_state == "none"
    await broker.open_round(kit.coordinator, "o2", 2)
    assert await broker.round_to_training(kit.coordinator, 1)
    assert (await broker.heartbeat("w", TTL_MS, {})).round_state == "open"
    backlog = await broker.backlog()
    assert (backlog.generated_tokens_round, backlog.finished_tokens_round) == (0, 0)
    (again, _) = await broker.take("w", 3, 2)
    assert (again.rollout_id, again.retention, again.attempts) == (first.rollout_id, 1, 0)
    assert await kit.check() == {"open": 6, "finished": 4}


async def test_round_moves_out_of_turn_are_refused(rounds: Kit) -> None:
    kit, broker = rounds, rounds.broker
    with pytest.raises(InvariantError, match="close_round 1"):
        await broker.close_round(kit.coordinator, "c", 1)
    await broker.open_round(kit.coordinator, "o1", 1)
    with pytest.raises(InvariantError, match="round 1 is open"):
        await broker.open_round(kit.coordinator, "o2", 2)
    with pytest.raises(InvariantError, match="state is open"):
        await broker.round_to_training(kit.coordinator, 1)
    with pytest.raises(InvariantError, match="round 1 is open"):
        await broker.finish_round(kit.learner, 1)


async def test_evaluation_goes_on_between_rounds(rounds: Kit) -> None:
    await rounds.feed("e1", size=1, kind="eval")
    await rounds.session("w")
    await rounds.broker.set_pin(rounds.coordinator, True)
    assert len(await rounds.broker.take("w", 3, 1)) == 1


async def carried(kit: Kit, times: int) -> None:
    """Open and close rounds without training anything."""
    for number in range(1, times + 1):
        await kit.broker.open_round(kit.coordinator, f"o{number}", number)
        if number == 1:
            await kit.session("w")
            for lease in await kit.broker.take("w", 2, 1):
                await kit.append(lease, 0, 5)
                await kit.park(lease)
        await kit.broker.close_round(kit.coordinator, f"c{number}", number)
        assert await kit.broker.round_to_training(kit.coordinator, number)
        await kit.broker.finish_round(kit.learner, number)


async def test_purge_drops_groups_above_sigma_only(rounds: Kit) -> None:
    kit, broker = rounds, rounds.broker
    await kit.feed("g1", size=2)
    await carried(kit, 2)
    await kit.feed("g2", size=1)
    assert await broker.purge(kit.coordinator, "p0", 2, "drop_group") == []
    assert await broker.purge(kit.coordinator, "p1", 1, "drop_group") == ["g1"]
    assert await broker.purge(kit.coordinator, "p1", 1, "drop_group") == ["g1"]
    assert await broker.purge(kit.coordinator, "p2", 1, "drop_group") == []
    (outcome,) = await broker.read_outcomes("0", 5)
    assert (outcome.end, outcome.retention, outcome.lengths) == ("purged", 2, (5, 5))
    assert (await broker.backlog()).queued_tickets == 1
    assert await kit.check() == {"purged": 10}


async def test_purge_replaces_with_a_fresh_sibling(rounds: Kit) -> None:
    kit, broker = rounds, rounds.broker
    await kit.feed("g1", size=3)
    await carried(kit, 1)
    await broker.open_round(kit.coordinator, "o9", 2)
    lease = (await broker.take("w", 1, 1))[0]
    purged = await broker.purge(kit.coordinator, "p", 0, "replace")
    assert sorted(purged) == ["g1.0", "g1.1", "g1.2"]
    assert await kit.append(lease, lease.num_tokens, 1) == "gone"
    assert await kit.state(lease.rollout_id) == "purged"
    fresh = await broker.take("w", 9, 1)
    assert sorted(x.rollout_id for x in fresh) == ["g1.3", "g1.4", "g1.5"]
    for each in fresh:
        await kit.append(each, 0, 2)
        await kit.finish(each, 2)
    await kit.grade(await broker.take_grading("w", 9), [0.0, 1.0, 0.0])
    assert await kit.group_state("g1") == "ready"
    assert await kit.check() == {"purged": 10, "graded": 6}
    *gone, ready = await broker.read_outcomes("0", 9)
    assert {o.rollout_id for o in gone} == set(purged)
    assert {(o.group_id, o.end, o.kind, o.rewards) for o in gone} == {("g1", "purged", "train", ())}
    assert sorted(o.lengths for o in gone) == [(0,), (5,), (5,)]
    for number, outcome in enumerate(sorted(gone, key=lambda o: o.entry_id)):
        assert outcome.reason == f"retention 1, replaced by g1.{number + 3}"
    assert (ready.end, ready.rollout_id) == ("ready", "")
    # A replaced rollout is not the end of a group: the breaker looks at those only.
    assert await broker.client.llen(broker.keys.ends) == 1


async def test_purge_leaves_finished_and_ready_alone(kit: Kit) -> None:
    await kit.ready("g1")
    await kit.feed("g2", size=1)
    await kit.session("w")
    (lease,) = await kit.broker.take("w", 1, 1)
    await kit.broker.client.hset(kit.broker.keys.rollout("g1.0"), "retention", "9")
    await kit.finish(lease, 0)
    await kit.broker.client.hset(kit.broker.keys.rollout("g2.0"), "retention", "9")
    assert await kit.broker.purge(kit.coordinator, "p", 0, "drop_group") == []


async def test_the_backlog_counts_what_it_says(kit: Kit) -> None:
    await kit.ready("g1")
    await kit.ready("g2")
    await kit.broker.reserve(kit.learner, "b1", ["g1"], 0, 3)
    await kit.broker.commit(kit.learner, "b1", {"g1": 2})
    await kit.feed("e1", kind="eval")
    await kit.feed("g3", size=4)
    await kit.session("w")
    leases = await kit.broker.take("w", 3, 1)
    await kit.append(leases[0], 0, 3)
    await kit.finish(leases[0], 3)
    await kit.append(leases[1], 0, 5)
    await kit.park(leases[1])
    backlog = await kit.broker.backlog()
    assert backlog == replace(
        backlog,
        open_groups=1,
        open_rollouts=3,
        running_rollouts=1,
        ready_groups=1,
        ready_tokens=8,
        admitted_tokens_known=8 + 8 + 3,
        admitted_rollouts_unfinished=3,
        reserved_tokens=0,
        taken_tokens=8,
        generated_tokens_round=24,
        finished_tokens_round=19,
        trainable_tokens_round=16,
        eval_open=1,
        queued_tickets=2,
        grading_jobs=1,
        paused_feeding="",
    )
    await kit.check()


async def test_mass_quarantine_trips_the_breaker_and_resume_clears_it(kit: Kit) -> None:
    await kit.ready(*[f"g{number}" for number in range(8)])
    bad = [new_group(f"b{number}", quarantine_reason="too long") for number in range(8)]
    await kit.broker.feed(kit.coordinator, "r1", bad, "c")
    assert (await kit.broker.backlog()).paused_feeding == ""
    await kit.broker.feed(kit.coordinator, "r2", [new_group("b9", quarantine_reason="empty")], "c")
    why = (await kit.broker.backlog()).paused_feeding
    assert why == (
        "9 of the last 17 groups ended quarantined or grade_error (limit 0.50); the last: empty"
    )
    await kit.broker.set_paused(False, "")
    assert (await kit.broker.backlog()).paused_feeding == ""


async def test_a_coordinator_that_lost_its_lock_changes_nothing(kit: Kit) -> None:
    broker, old = kit.broker, kit.coordinator
    await kit.feed("g1")
    await kit.advance(60_000)
    await broker.acquire_lock("coordinator", "c2", TTL_MS)
    before = await broker.backlog()
    for call in (
        broker.feed(old, "r9", [new_group("g9")], "x"),
        broker.reap(old, 3),
        broker.open_round(old, "o", 1),
        broker.close_round(old, "c", 1),
        broker.round_to_training(old, 1),
        broker.purge(old, "p", 0, "drop_group"),
        broker.end_group(old, "g1", "purged", "no"),
        broker.set_pin(old, True),
        broker.set_phase(old, "done"),
        broker.trim_outcomes(old, "999-0"),
        broker.begin_incarnation(old, "no"),
    ):
        with pytest.raises(FencedError, match="c2 holds token"):
            await call
    assert await broker.backlog() == before
    assert (await broker.run_meta())["phase"] == "running"
