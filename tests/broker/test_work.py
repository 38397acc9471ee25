"""Tickets, leases, appends, parks and finishes, with repeats and zombies."""

from __future__ import annotations

import pytest

from ringasync.broker.types import AppendItem
from ringasync.errors import InvariantError, SessionLostError

from .kit import TTL_MS, Kit, item, new_group, payload


async def test_a_rollout_moves_over_two_workers_and_versions(kit: Kit) -> None:
    await kit.feed("g1", size=1)
    await kit.session("w1")
    await kit.session("w2")
    (lease,) = await kit.broker.take("w1", 5, 3)
    assert lease.prompt_ids == (1, 2, 3)
    assert (lease.num_tokens, lease.segments, lease.max_new_tokens) == (0, (), 64)
    assert await kit.append(lease, 0, 5, 3) == "ok"
    assert await kit.append(lease, 5, 2, 4) == "ok"
    assert await kit.park(lease) == "ok"
    assert await kit.state("g1.0") == "parked"
    (again,) = await kit.broker.take("w2", 5, 5)
    assert again.segments == (payload(0, 5, 3), payload(5, 2, 4))
    assert (again.num_tokens, again.retention, again.attempts) == (7, 0, 0)
    assert again.token != lease.token
    assert await kit.append(again, 7, 3, 5) == "ok"
    assert await kit.finish(again, 10) == "ok"
    fields = await kit.broker.rollout("g1.0")
    assert fields is not None
    assert fields["versions"] == "3-5"
    assert fields["tokens"] == "10"
    events = [(e["event"], e.get("worker")) for e in await kit.broker.history("g1.0")]
    assert events == [("leased", "w1"), ("parked", "w1"), ("leased", "w2"), ("finished", "w")]
    assert await kit.check() == {"finished": 10}


async def test_every_repeat_is_answered_as_duplicate_and_changes_nothing(kit: Kit) -> None:
    await kit.feed("g1", size=1)
    await kit.session("w1")
    (lease,) = await kit.broker.take("w1", 1, 1)
    assert await kit.append(lease, 0, 4) == "ok"
    assert await kit.append(lease, 0, 4) == "duplicate"
    assert await kit.append(lease, 2, 2) == "duplicate"
    assert await kit.append(lease, 5, 1) == "gap"
    assert await kit.append(lease, 3, 2) == "gap"
    assert await kit.finish(lease, 4) == "ok"
    assert await kit.finish(lease, 4) == "duplicate"
    assert await kit.broker.client.xlen(kit.broker.keys.grading) == 1
    assert await kit.check() == {"finished": 4}


async def test_items_of_one_rollout_in_one_call_follow_each_other(kit: Kit) -> None:
    await kit.feed("g1", size=1)
    await kit.session("w1")
    (lease,) = await kit.broker.take("w1", 1, 1)
    items = [item(lease, 0, 3, 1), item(lease, 3, 2, 2), item(lease, 3, 2, 2), item(lease, 9, 1, 2)]
    assert await kit.broker.append_many("w1", items) == ["ok", "ok", "duplicate", "gap"]
    fields = await kit.broker.rollout("g1.0")
    assert fields is not None
    assert (fields["tokens"], fields["versions"], fields["progress"]) == ("5", "1-2", "5")


async def test_environment_tokens_count_in_length_and_not_in_the_ledger(kit: Kit) -> None:
    await kit.feed("g1", size=1)
    await kit.session("w1")
    (lease,) = await kit.broker.take("w1", 1, 1)
    assert await kit.append(lease, 0, 3) == "ok"
    environment = AppendItem(lease.rollout_id, lease.token, 3, 6, 0, 0, b"env")
    assert await kit.broker.append_many("w1", [environment]) == ["ok"]
    assert await kit.append(lease, 9, 1) == "ok"
    assert await kit.finish(lease, 10) == "ok"
    assert await kit.check() == {"finished": 4}


async def test_policy_and_other_tokens_are_counted_apart_in_plain_numbers(kit: Kit) -> None:
    await kit.feed("g1", size=1)
    await kit.session("w1")
    (lease,) = await kit.broker.take("w1", 1, 1)
    key = kit.broker.keys.rollout("g1.0")
    stored = []
    for start, length, tokens in ((0, 3, 3), (3, 6, 0), (9, 4, 3), (13, 2, 2)):
        segment = AppendItem(lease.rollout_id, lease.token, start, length, tokens, 1, b"x")
        assert await kit.broker.append_many("w1", [segment]) == ["ok"]
        stored.append(await kit.broker.client.hmget(key, "length", "tokens"))
    assert stored == [[b"3", b"3"], [b"9", b"3"], [b"13", b"6"], [b"15", b"8"]]
    assert await kit.finish(lease, 15) == "ok"
    assert await kit.check() == {"finished": 8}


async def test_a_segment_without_tokens_is_never_stored(kit: Kit) -> None:
    await kit.feed("g1", size=1)
    await kit.session("w1")
    (lease,) = await kit.broker.take("w1", 1, 1)
    assert await kit.append(lease, 0, 3) == "ok"
    for start, length in ((3, 0), (3, -1), (4, -2)):
        empty = AppendItem(lease.rollout_id, lease.token, start, length, 0, 0, b"x")
        assert await kit.broker.append_many("w1", [empty]) == ["duplicate"]
    assert await kit.broker.client.llen(kit.broker.keys.segments("g1.0")) == 1
    await kit.check()


async def test_a_call_answers_for_each_rollout_in_its_place(kit: Kit) -> None:
    await kit.feed("g1", size=4)
    await kit.session("w1")
    leases = await kit.broker.take("w1", 4, 2)
    assert await kit.park(leases[1]) == "ok"
    items = [item(lease, 0, n, 2) for n, lease in enumerate(leases, 1)]
    items += [item(leases[0], 1, 5, 2), item(leases[2], 9, 1, 2), item(leases[3], 4, 2, 1)]
    statuses = await kit.broker.append_many("w1", items)
    assert statuses == ["ok", "fenced", "ok", "ok", "ok", "gap", "gap"]
    fields = [await kit.broker.rollout(lease.rollout_id) or {} for lease in leases]
    assert [entry["length"] for entry in fields] == ["6", "0", "3", "4"]
    assert [entry["versions"] for entry in fields] == ["2-2", "", "2-2", "2-2"]
    counted = await kit.broker.client.hget(kit.broker.keys.round, "generated")
    assert counted == b"13"
    assert await kit.check() == {"open": 13}


async def test_progress_is_what_came_under_the_present_lease(kit: Kit) -> None:
    await kit.feed("g1", size=1)
    await kit.session("w1")
    seen = []
    for start, length in ((0, 5), (5, 2)):
        (lease,) = await kit.broker.take("w1", 1, 1)
        before = await kit.broker.rollout("g1.0") or {}
        assert await kit.append(lease, start, length) == "ok"
        after = await kit.broker.rollout("g1.0") or {}
        seen.append((before["progress"], after["progress"], after["tokens"]))
        assert await kit.park(lease) == "ok"
    assert seen == [("0", "5", "5"), ("0", "2", "7")]
    history = await kit.broker.history("g1.0")
    assert [entry["tokens"] for entry in history if entry["event"] == "parked"] == [5, 2]


async def test_what_appends_touch_stands_first_in_a_small_hash(kit: Kit) -> None:
    await kit.feed("g1", size=1)
    await kit.session("w1")
    (lease,) = await kit.broker.take("w1", 1, 1)
    assert await kit.append(lease, 0, 3) == "ok"
    key = kit.broker.keys.rollout("g1.0")
    assert await kit.broker.client.object("ENCODING", key) in (b"ziplist", b"listpack")
    hot = [b"state", b"lease", b"length", b"tokens", b"versions", b"kind"]
    assert (await kit.broker.client.hkeys(key))[: len(hot)] == hot


async def test_a_falling_version_is_refused(kit: Kit) -> None:
    await kit.feed("g1", size=1)
    await kit.session("w1")
    (lease,) = await kit.broker.take("w1", 1, 2)
    assert await kit.append(lease, 0, 3, 2) == "ok"
    assert await kit.append(lease, 3, 3, 1) == "gap"


async def test_a_worker_behind_gets_no_rollout_of_a_newer_version(kit: Kit) -> None:
    await kit.feed("g1", "g2", size=1)
    await kit.session("w1")
    await kit.session("old")
    first, second = await kit.broker.take("w1", 2, 2)
    assert await kit.append(first, 0, 3, 2) == "ok"
    assert await kit.append(second, 0, 3, 1) == "ok"
    assert await kit.park(first) == await kit.park(second) == "ok"
    assert [lease.rollout_id for lease in await kit.broker.take("old", 5, 1)] == ["g2.0"]
    assert [lease.rollout_id for lease in await kit.broker.take("w1", 5, 2)] == ["g1.0"]
    await kit.check()


async def test_resumable_rollouts_go_before_fresh_ones(kit: Kit) -> None:
    await kit.feed("g1", size=1)
    await kit.session("w1")
    (lease,) = await kit.broker.take("w1", 1, 1)
    await kit.append(lease, 0, 3)
    await kit.feed("g2", size=1)
    assert await kit.park(lease) == "ok"
    taken = [each.rollout_id for each in await kit.broker.take("w1", 2, 1)]
    assert taken == ["g1.0", "g2.0"]


async def test_a_repeated_take_gives_the_same_leases(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    await kit.feed("g1", size=3)
    await kit.session("w1")
    monkeypatch.setattr("ringasync.broker.working.new_nonce", lambda: "0123456789abcdef")
    first = await kit.broker.take("w1", 2, 1)
    again = await kit.broker.take("w1", 2, 1)
    assert len(first) == 2
    assert sorted(first, key=lambda x: x.rollout_id) == sorted(again, key=lambda x: x.rollout_id)
    assert await kit.broker.client.xlen(kit.broker.keys.tickets) == 1
    await kit.check()


async def test_a_dead_workers_rollouts_return_and_the_zombie_is_refused(kit: Kit) -> None:
    await kit.feed("g1", size=2)
    await kit.session("dead")
    await kit.session("w2")
    with_tokens, without = await kit.broker.take("dead", 2, 1)
    assert await kit.append(with_tokens, 0, 4) == "ok"
    counts = await kit.expire_sessions("w2")
    assert (counts["sessions"], counts["parked"], counts["queued"]) == (1, 1, 1)
    assert not (await kit.broker.heartbeat("dead", TTL_MS, {})).alive
    with pytest.raises(SessionLostError, match="dead"):
        await kit.broker.take("dead", 1, 1)
    taken = {lease.rollout_id: lease for lease in await kit.broker.take("w2", 2, 1)}
    assert taken[with_tokens.rollout_id].attempts == 0
    assert taken[without.rollout_id].attempts == 1
    assert taken[with_tokens.rollout_id].retention == 0
    for zombie in (with_tokens, without):
        assert await kit.append(zombie, zombie.num_tokens, 4) == "fenced"
        assert await kit.finish(zombie, 4) == "fenced"
        assert await kit.park(zombie) == "fenced"
        row = (zombie.rollout_id, zombie.token, "no")
        assert await kit.broker.quarantine_many("dead", [row]) == ["fenced"]
    assert await kit.check() == {"open": 4}


async def test_leases_lost_without_progress_quarantine_the_group(kit: Kit) -> None:
    await kit.feed("g1", size=2)
    for number in range(3):
        session = await kit.session(f"victim{number}")
        leases = {lease.rollout_id: lease for lease in await kit.broker.take(session, 2, 1)}
        sibling = leases["g1.1"]
        assert await kit.append(sibling, sibling.num_tokens, 2) == "ok"
        counts = await kit.expire_sessions()
    assert counts["quarantined"] == 1
    assert await kit.group_state("g1") == "quarantined"
    outcome = (await kit.broker.read_outcomes("0", 10))[-1]
    assert outcome.end == "quarantined"
    assert "g1.0: 3 leases lost without progress" in outcome.reason
    assert await kit.append(sibling, sibling.num_tokens + 2, 2) == "gone"
    assert await kit.broker.client.exists(kit.broker.keys.segments("g1.1")) == 0
    assert await kit.check() == {"quarantined": 6}
    await kit.session("w")
    await kit.feed("g2", size=1)
    assert [x.rollout_id for x in await kit.broker.take("w", 5, 1)] == ["g2.0"]


async def test_parking_raises_attempts_only_after_an_error(kit: Kit) -> None:
    await kit.feed("g1", size=1)
    await kit.session("w")
    attempts = []
    for why in ("round closed", "error: engine failed", "drain", "error: again"):
        (lease,) = await kit.broker.take("w", 1, 1)
        attempts.append(lease.attempts)
        assert await kit.park(lease, why) == "ok"
        assert await kit.park(lease, why) == "duplicate"
    assert attempts == [0, 0, 1, 1]
    assert await kit.state("g1.0") == "queued"


async def test_closing_a_session_returns_leases_and_gradings_at_once(kit: Kit) -> None:
    await kit.feed("g1", size=3)
    await kit.session("w")
    first, second, third = await kit.broker.take("w", 3, 1)
    await kit.append(first, 0, 4)
    await kit.append(second, 0, 4)
    await kit.finish(second, 4)
    assert len(await kit.broker.take_grading("w", 1)) == 1
    await kit.broker.close_session("w")
    assert [await kit.state(lease.rollout_id) for lease in (first, second, third)] == [
        "parked",
        "finished",
        "queued",
    ]
    fields = await kit.broker.rollout(third.rollout_id)
    assert fields is not None
    assert fields["attempts"] == "0"
    assert await kit.broker.sessions() == []
    await kit.check()


async def test_quarantine_by_a_worker_ends_siblings_and_tickets(kit: Kit) -> None:
    await kit.feed("g1", size=3)
    await kit.session("w")
    first, second = await kit.broker.take("w", 2, 1)
    await kit.append(first, 0, 4)
    row = (second.rollout_id, second.token, "NaN log-prob")
    assert await kit.broker.quarantine_many("w", [row]) == ["ok"]
    assert await kit.broker.quarantine_many("w", [row]) == ["gone"]
    assert await kit.append(first, 4, 4) == "gone"
    assert await kit.broker.client.xlen(kit.broker.keys.tickets) == 0
    assert await kit.broker.client.scard(kit.broker.keys.leases("w")) == 0
    assert await kit.check() == {"quarantined": 4}


async def test_finish_with_another_length_is_an_error_and_moves_the_others(kit: Kit) -> None:
    await kit.feed("g1", size=2)
    await kit.session("w")
    first, second = await kit.broker.take("w", 2, 1)
    await kit.append(first, 0, 4)
    rows = [
        (first.rollout_id, first.token, "stop", 9),
        (second.rollout_id, second.token, "stop", 0),
    ]
    with pytest.raises(InvariantError, match=r"g1\.0: .* 9 tokens, the record holds 4"):
        await kit.broker.finish_many("w", rows)
    assert await kit.state("g1.0") == "leased"
    assert await kit.state("g1.1") == "finished"
    await kit.check()


async def test_nothing_is_given_while_paused_or_done(kit: Kit) -> None:
    await kit.feed("g1", size=1)
    await kit.session("w")
    await kit.broker.set_paused(True, "lunch")
    assert (await kit.broker.heartbeat("w", TTL_MS, {})).paused
    assert await kit.broker.take("w", 1, 1) == []
    await kit.broker.set_paused(False, "")
    await kit.broker.set_phase(kit.coordinator, "done")
    assert await kit.broker.take("w", 1, 1) == []
    await kit.broker.set_phase(kit.coordinator, "finishing")
    assert len(await kit.broker.take("w", 1, 1)) == 1


async def test_unknown_rollouts_are_gone(kit: Kit) -> None:
    ghost = AppendItem("g9.0", "1.1.x", 0, 1, 1, 1, b"x")
    assert await kit.broker.append_many("w", [ghost]) == ["gone"]
    assert await kit.broker.finish_many("w", [("g9.0", "1.1.x", "stop", 0)]) == ["gone"]
    assert await kit.broker.park_many("w", [("g9.0", "1.1.x", "drain")]) == ["gone"]
    assert await kit.broker.append_many("w", []) == []


async def test_feeding_is_idempotent_refuses_duplicates_and_keeps_bad_prompts_out(kit: Kit) -> None:
    groups = [new_group("g1"), new_group("g2", quarantine_reason="prompt is empty")]
    assert await kit.broker.feed(kit.coordinator, "r1", groups, "cursor-2") == 2
    assert await kit.broker.feed(kit.coordinator, "r1", groups, "cursor-2") == 2
    assert await kit.broker.data_cursor() == "cursor-2"
    with pytest.raises(InvariantError, match="g1 was fed before"):
        await kit.broker.feed(kit.coordinator, "r2", [new_group("g3"), new_group("g1")], "x")
    with pytest.raises(InvariantError, match="g4 was fed before"):
        await kit.broker.feed(kit.coordinator, "r3", [new_group("g4"), new_group("g4")], "x")
    assert await kit.broker.data_cursor() == "cursor-2"
    assert await kit.group_state("g3") == "absent"
    (outcome,) = await kit.broker.read_outcomes("0", 10)
    assert (outcome.group_id, outcome.end, outcome.reason) == (
        "g2",
        "quarantined",
        "prompt is empty",
    )
    backlog = await kit.broker.backlog()
    assert (backlog.open_groups, backlog.open_rollouts, backlog.queued_tickets) == (1, 2, 2)
    await kit.check()
