"""The run, its locks, sessions, clock and metrics."""

from __future__ import annotations

import json

import pytest

from ringasync.broker.client import Broker
from ringasync.broker.keys import Keys
from ringasync.errors import (
    ConfigError,
    FencedError,
    IncarnationError,
    JoinRefusedError,
    LockHeldError,
    RingError,
)
from tests.conftest import CONFIG_HASH, RedisServer

from .kit import TTL_MS, Kit


async def test_a_run_is_created_once_and_joined_with_the_same_configuration(broker: Broker) -> None:
    assert not await broker.create_run("", CONFIG_HASH)
    await broker.join_run(CONFIG_HASH)
    with pytest.raises(JoinRefusedError, match=f"configuration {CONFIG_HASH}.*has other"):
        await broker.join_run("other")
    with pytest.raises(JoinRefusedError, match="configuration"):
        await broker.create_run("", "other")
    await broker.client.hset(broker.keys.meta, "schema", "99")
    with pytest.raises(JoinRefusedError, match="schema 99, this process has 1"):
        await broker.join_run(CONFIG_HASH)
    with pytest.raises(JoinRefusedError, match="schema 99"):
        await broker.create_run("", CONFIG_HASH)


async def test_settings_that_scripts_need_come_from_the_configuration(broker: Broker) -> None:
    await broker.delete_run()
    schedule = {"quarantine_breaker": 0.25, "max_attempts": 7}
    config = json.dumps({"run": {"seed": 42}, "schedule": schedule})
    assert await broker.create_run(config, "h", mode="rounds")
    meta = await broker.run_meta()
    names = ("seed", "breaker", "max_attempts", "mode", "config")
    assert [meta[name] for name in names] == ["42", "0.25", "7", "rounds", config]


async def test_a_run_that_is_not_there(redis_server: RedisServer, run_name: str) -> None:
    broker = await Broker.connect(redis_server.url, run_name)
    for call in (
        broker.join_run("h"),
        broker.run_meta(),
        broker.acquire_lock("learner", "l", TTL_MS),
        broker.open_session("s", "worker", TTL_MS, {}),
        broker.heartbeat("s", TTL_MS, {}),
        broker.set_paused(True, ""),
    ):
        with pytest.raises(RingError, match=r"does not exist.*start its coordinator first"):
            await call
    await broker.create_run("", "h")
    assert await broker.delete_run() > 0
    assert [key async for key in broker.client.scan_iter(match=broker.keys.prefix + "*")] == []
    await broker.create_run("", "h")
    other = await Broker.connect(redis_server.url, run_name)
    await other.delete_run()
    with pytest.raises(IncarnationError, match="vanished"):
        await broker.heartbeat("s", TTL_MS, {})
    await broker.close()
    await other.close()


async def test_deleting_a_run_leaves_others_alone(
    broker: Broker, redis_server: RedisServer
) -> None:
    other = await Broker.connect(redis_server.url, broker.run + "2")
    await other.create_run("", "h")
    await broker.delete_run()
    await other.join_run("h")
    await other.delete_run()
    await other.close()


def test_run_names_are_checked() -> None:
    assert Keys("a.b-C_1").rollout("g1.0") == "ring:{a.b-C_1}:rollout:g1.0"
    for name in ("", "a{b}", "a:b", "a/b", "-a", "a" * 65, "a b", "é"):
        with pytest.raises(ConfigError, match=r"run\.name"):
            Keys(name)


async def test_one_holder_per_role_and_rising_tokens(kit: Kit) -> None:
    broker = kit.broker
    await kit.advance(1200)
    with pytest.raises(LockHeldError, match="c1") as held:
        await broker.acquire_lock("coordinator", "c2", TTL_MS)
    assert (held.value.role, held.value.heartbeat_age_ms) == ("coordinator", 1200)
    await broker.renew_lock(kit.coordinator, TTL_MS)
    await kit.advance(TTL_MS - 1)
    with pytest.raises(LockHeldError):
        await broker.acquire_lock("coordinator", "c2", TTL_MS)
    await kit.advance(1)
    second = await broker.acquire_lock("coordinator", "c2", TTL_MS)
    assert second.token == kit.coordinator.token + 1
    with pytest.raises(FencedError, match=r"'coordinator': c2 holds token 2"):
        await broker.renew_lock(kit.coordinator, TTL_MS)
    await broker.release_lock(kit.coordinator)
    await broker.renew_lock(second, TTL_MS)
    await broker.release_lock(second)
    with pytest.raises(FencedError, match="nobody holds it"):
        await broker.renew_lock(second, TTL_MS)
    third = await broker.acquire_lock("coordinator", "c1", TTL_MS)
    assert third.token == second.token + 1


async def test_a_lock_nobody_took_meanwhile_is_renewed_after_its_end(kit: Kit) -> None:
    await kit.advance(TTL_MS * 3)
    await kit.broker.renew_lock(kit.learner, TTL_MS)
    with pytest.raises(LockHeldError):
        await kit.broker.acquire_lock("learner", "l2", TTL_MS)


async def test_the_heartbeat_brings_everything_back(kit: Kit) -> None:
    broker = kit.broker
    await broker.open_session("s1", "worker", TTL_MS, {"worker": "w1", "host": "box"})
    poll = await broker.heartbeat("s1", TTL_MS, {"tokens_per_s": 12.5, "doing": "generate"})
    assert poll.alive
    assert (poll.phase, poll.paused, poll.latest_version, poll.pin_version) == (
        "running",
        False,
        1,
        None,
    )
    assert (poll.round_state, poll.incarnation, poll.learner_step) == ("none", 1, 0)
    await kit.advance(700)
    (row,) = await broker.sessions()
    assert row["id"] == "s1"
    assert (row["role"], row["state"], row["age_ms"], row["host"]) == (
        "worker",
        "alive",
        "700",
        "box",
    )
    assert (row["tokens_per_s"], row["doing"], row["leases"]) == ("12.5", "generate", "0")
    await kit.advance(TTL_MS)
    assert (await broker.sessions())[0]["state"] == "late"
    assert not (await broker.heartbeat("nobody", TTL_MS, {})).alive


async def test_a_gap_in_time_gives_every_session_one_period_of_grace(kit: Kit) -> None:
    """Redis was down or its clock jumped: nobody could send a heartbeat."""
    await kit.feed("g1", size=1)
    await kit.session("w1")
    await kit.session("w2")
    (lease,) = await kit.broker.take("w1", 1, 1)
    await kit.advance(3_600_000)
    assert (await kit.broker.reap(kit.coordinator, 3))["sessions"] == 0
    assert (await kit.broker.heartbeat("w2", TTL_MS, {})).alive
    assert await kit.append(lease, 0, 3) == "ok"
    counts = await kit.expire_sessions("w2")
    assert counts == {
        "sessions": 1,
        "parked": 1,
        "queued": 0,
        "finished": 0,
        "quarantined": 0,
        "grade_error": 0,
    }


async def test_a_heartbeat_after_the_gap_does_not_use_up_the_others_grace(kit: Kit) -> None:
    await kit.session("w1")
    await kit.session("w2")
    await kit.advance(3_600_000)
    assert (await kit.broker.heartbeat("w2", TTL_MS, {})).alive
    assert (await kit.broker.reap(kit.coordinator, 3))["sessions"] == 0
    assert (await kit.broker.heartbeat("w1", TTL_MS, {})).alive


async def test_the_real_clock_never_falls(redis_server: RedisServer, run_name: str) -> None:
    broker = await Broker.connect(redis_server.url, run_name)
    await broker.create_run("", "h")
    first = await broker.now_ms()
    assert await broker.now_ms() >= first
    ahead = first + 3_600_000
    await broker.client.hset(broker.keys.clock, "last", str(ahead))  # as if the clock was set back
    assert await broker.now_ms() == ahead
    await broker.open_session("w1", "worker", TTL_MS, {})
    assert ahead <= await broker.now_ms() < ahead + 60_000
    offset = await broker.client.hget(broker.keys.clock, "offset")
    assert 3_590_000 < int(offset or 0) <= 3_600_000
    await broker.delete_run()
    await broker.close()


async def test_metrics_come_back_in_order(broker: Broker) -> None:
    for step in range(3):
        assert await broker.push_metrics("learner", {"step": step, "loss": 0.5})
    rows = await broker.read_metrics("0", 2)
    assert [row["step"] for _, row in rows] == [0, 1]
    assert [row["step"] for _, row in await broker.read_metrics(rows[-1][0], 5)] == [2]
    assert rows[0][1]["role"] == "learner"


async def test_outcomes_are_read_on_and_trimmed(kit: Kit) -> None:
    await kit.ready("g1", "g2", "g3")
    first = await kit.broker.read_outcomes("0", 2)
    rest = await kit.broker.read_outcomes(first[-1].entry_id, 9)
    assert [o.group_id for o in (*first, *rest)] == ["g1", "g2", "g3"]
    await kit.broker.trim_outcomes(kit.coordinator, rest[0].entry_id)
    assert await kit.broker.read_outcomes("0", 9) == rest
