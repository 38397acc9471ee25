"""A broker behind Sentinels and in a cluster: real servers, killed, replaced and emptied in use."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ringasync.broker import address
from ringasync.broker.client import Broker
from ringasync.broker.types import Fence, VersionInfo
from ringasync.errors import BrokerRefusedError, BrokerUnreachableError
from tests.conftest import RedisServer
from tests.redis_process import free_port
from tests.spread_redis import (
    CLUSTER,
    DATA,
    SLOTS,
    Cluster,
    SentinelGroup,
    Server,
    is_whole,
    redis_cluster,
    sentinel_group,
    wait_for,
)
from tests.tls_kit import Authority, tls_front

from .kit import item, new_group

pytestmark = pytest.mark.timeout(120)
BUDGET_S = 40.0
LOCK_MS = 120_000


@pytest.fixture
def group(any_redis: RedisServer, tmp_path: Path) -> Iterator[SentinelGroup]:
    with sentinel_group(any_redis.binary, tmp_path) as made:
        yield made


@pytest.fixture
def cluster(any_redis: RedisServer, tmp_path: Path) -> Iterator[Cluster]:
    with redis_cluster(any_redis.binary, tmp_path) as made:
        yield made


@asynccontextmanager
async def connected(url: str, run: str, **options: Any) -> AsyncIterator[Broker]:
    broker = await Broker.connect(url, run, **{"retry_budget_s": BUDGET_S, **options})
    try:
        yield broker
    finally:
        await broker.close()


@asynccontextmanager
async def new_run(url: str, run: str) -> AsyncIterator[tuple[Broker, Fence]]:
    async with connected(url, run) as broker:
        yield broker, await begin(broker)


async def begin(broker: Broker) -> Fence:
    await broker.create_run("", "h")
    fence = await broker.acquire_lock("coordinator", "c", LOCK_MS)
    learner = await broker.acquire_lock("learner", "l", LOCK_MS)
    await broker.publish(learner, VersionInfo(1, 0, 0, "{}"))
    assert await broker.feed(fence, "f1", [new_group("g1", 8)], "1")
    await broker.open_session("w", "worker", LOCK_MS, {})
    return fence


async def accept(broker: Broker, tokens: int) -> None:
    """Take one rollout and have this many of its tokens accepted."""
    (lease,) = await broker.take("w", 1, 1)
    assert await broker.append_many("w", [item(lease, 0, tokens)]) == ["ok"]


async def test_a_failover_to_a_replica_that_lags_is_an_outage_and_a_rollback(
    group: SentinelGroup, run_name: str
) -> None:
    async with new_run(group.url, run_name) as (broker, fence):
        await accept(broker, 4)
        await asyncio.to_thread(lambda: group.servers[0].ask("WAIT", 1, 5000))
        group.cut_replication()
        await accept(broker, 6)
        assert (await broker.audit()).accepted_tokens == 10
        group.servers[0].kill()
        assert (await broker.audit()).accepted_tokens == 4
        assert group.primary() is group.servers[1]
        assert (await broker.check_incarnation(fence) or 0) > 1
        audit = await broker.audit()
        assert audit.balanced
        assert (audit.accepted_tokens, audit.counters["lost"]) == (10, 6)


async def test_a_primary_that_was_made_a_replica_is_left(
    group: SentinelGroup, run_name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody hangs up on us: only its answers say what it is."""
    async with new_run(group.url, run_name) as (broker, fence):
        old, new = group.servers
        old.ask("REPLICAOF", "127.0.0.1", new.port)
        group.sentinels[0].ask("SENTINEL", "FAILOVER", "mymaster")

        async def until_moved() -> None:
            while group.primary() is not new:
                await broker.renew_lock(fence, LOCK_MS)

        await asyncio.wait_for(until_moved(), BUDGET_S)
        await broker.renew_lock(fence, LOCK_MS)
    said = capsys.readouterr().out  # out of a script on 6.2, by itself on 7
    assert f"{old.port} does not hold the run now" in said or "master is now a slave" in said


async def test_a_killed_node_of_a_cluster_comes_back_with_the_run(
    cluster: Cluster, run_name: str
) -> None:
    async with new_run(cluster.url, run_name) as (broker, fence):
        await accept(broker, 4)
        node = cluster.owner(run_name)
        node.ask("CONFIG", "SET", "appendfsync", "always")
        await accept(broker, 3)
        node.kill()
        waiting = asyncio.create_task(broker.audit())
        await asyncio.to_thread(node.start)
        assert (await waiting).accepted_tokens == 7
        assert (await broker.check_incarnation(fence) or 0) > 1


async def test_a_slot_that_moves_in_use_takes_the_run_along(
    cluster: Cluster, run_name: str
) -> None:
    async with new_run(cluster.url, run_name) as (broker, fence):
        before = cluster.owner(run_name)
        done = asyncio.Event()

        async def work() -> int:
            accepted = 0
            while not done.is_set() or accepted < 8:
                if accepted < 8:
                    await accept(broker, 1)
                    accepted += 1
                await broker.renew_lock(fence, LOCK_MS)
                assert (await broker.run_meta())["config_hash"] == "h"
                assert [row["id"] for row in await broker.sessions()] == ["w"]  # a pipeline
            return accepted

        working = asyncio.create_task(work())
        await asyncio.sleep(0)
        after = await asyncio.to_thread(cluster.migrate, run_name, 2)
        done.set()
        accepted = await working
        assert after is not before
        assert cluster.owner(run_name) is after
        audit = await broker.audit()
        assert (audit.balanced, audit.accepted_tokens) == (True, accepted)
        assert (await broker.check_incarnation(fence) or 0) > 1  # another process: leases are void
        assert await broker.delete_run() > 0
        assert after.ask("KEYS", "*") == []


async def test_a_cluster_over_tls_by_the_address_that_it_announces(
    any_redis: RedisServer, tmp_path: Path, run_name: str
) -> None:
    authority, stranger = Authority.make(tmp_path / "ca"), Authority.make(tmp_path / "other")
    context = authority.server_context("127.0.0.1", asks_client=False)
    node = Server(any_redis.binary, tmp_path / "node", (*DATA, *CLUSTER))
    with tls_front(node.port, context) as front:
        node.arguments += ("--cluster-announce-port", str(front))
        node.arguments += ("--cluster-announce-ip", "127.0.0.1")
        try:
            node.start()
            node.ask("CLUSTER", "ADDSLOTS", *range(SLOTS))
            wait_for(lambda: is_whole(node, 1), "a cluster of one")
            url = f"rediss+cluster://127.0.0.1:{front}"
            trusting = address.with_tls(url, str(authority.ca_file), "", "")
            async with new_run(trusting, run_name) as (broker, _):
                pool = broker.client.connection_pool
                assert pool.master_address == ("127.0.0.1", front)  # type: ignore[attr-defined]
            untrusted = address.with_tls(url, str(stranger.ca_file), "", "")
            with pytest.raises(BrokerRefusedError, match=r"redis\.tls_ca_file"):
                await Broker.connect(untrusted, run_name, retry_budget_s=BUDGET_S)
        finally:
            node.kill()


async def test_sentinels_with_a_password(
    any_redis: RedisServer, tmp_path: Path, run_name: str
) -> None:
    with sentinel_group(any_redis.binary, tmp_path) as group:
        for sentinel in group.sentinels:  # as a file would set it; those that know each other stay
            sentinel.ask("ACL", "SETUSER", "default", "resetpass", ">of-the-sentinels")
        for wrong in (None, "wrong"):
            with pytest.raises(BrokerRefusedError, match="RINGASYNC_SENTINEL_PASSWORD"):
                await Broker.connect(group.url, run_name, sentinel_password=wrong)
        right = {"sentinel_password": "of-the-sentinels"}
        async with connected(group.url, run_name, **right) as broker:
            assert await broker.create_run("", "h")
        unknown = group.url.replace("mymaster", "theirs")
        with pytest.raises(BrokerUnreachableError, match="No master found for 'theirs'"):
            await Broker.connect(unknown, run_name, retry_budget_s=0.5, **right)  # type: ignore[arg-type]


async def test_the_primary_that_is_named_must_be_fit_as_well(
    group: SentinelGroup, run_name: str
) -> None:
    """Behind loopback Sentinels: one that evicts; one that everybody reaches; the next after it."""
    first, second = group.servers
    first.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    with pytest.raises(BrokerRefusedError, match="allkeys-lru"):
        await Broker.connect(group.url, run_name)
    first.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")
    with pytest.raises(BrokerRefusedError, match="refused the password"):
        await Broker.connect(group.url, run_name, password="needless", username="nobody")
    second.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    async with new_run(group.url, run_name) as (broker, _):
        first.kill()
        with pytest.raises(BrokerRefusedError, match="allkeys-lru"):
            await broker.audit()


async def test_open_servers_are_refused_wherever_they_are_named() -> None:
    with pytest.raises(BrokerRefusedError, match="RINGASYNC_REDIS_PASSWORD"):
        await Broker.connect("redis+cluster://127.0.0.1:1,10.0.0.1:1", "demo")
    beyond = "redis+sentinel://127.0.0.1:1,10.0.0.1:1/mymaster"
    with pytest.raises(BrokerRefusedError, match="RINGASYNC_REDIS_PASSWORD"):
        await Broker.connect(beyond, "demo")
    with pytest.raises(BrokerRefusedError, match="RINGASYNC_SENTINEL_PASSWORD"):
        await Broker.connect(beyond, "demo", password="secret")


async def test_one_server_is_no_cluster(any_redis: RedisServer) -> None:
    url = any_redis.url.replace("redis://", "redis+cluster://").split("?")[0]
    with pytest.raises(BrokerRefusedError, match=r"cluster support disabled.*redis://HOST"):
        await Broker.connect(url, "demo")


async def test_servers_that_are_all_away_are_named() -> None:
    ports = free_port(), free_port()
    hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
    for url in (f"redis+cluster://{hosts}", f"redis+sentinel://{hosts}/mymaster"):
        with pytest.raises(BrokerUnreachableError, match=r"redis\.retry_budget_s") as error:
            await Broker.connect(url, "demo", retry_budget_s=0.3)
        assert all(str(port) in str(error.value) for port in ports)


@pytest.mark.parametrize(
    ("url", "rule"),
    [
        ("redis+sentinel://h:26379", "must name the Sentinels' master"),
        ("redis+sentinel://h:26379/a/b", "must name the Sentinels' master"),
        ("redis+sentinel://h:port/m", "bad server 'h:port'"),
        ("redis+sentinel://h,/m", "empty place"),
        ("redis+sentinel://h/m?db=x", "no number"),
        ("redis+cluster://h:6379/3", "only number 0"),
        ("redis+cluster://h:6379?db=1", "only number 0"),
        ("redis+clusters://h:6379", "must begin with"),
        ("rediss+cluster://h?ssl_cert_reqs=none", "ssl_cert_reqs"),
    ],
)
async def test_an_address_says_what_is_wrong_with_it(url: str, rule: str) -> None:
    with pytest.raises(BrokerRefusedError, match=rule) as error:
        await Broker.connect(url, "demo")
    assert "redis.url" in str(error.value)


def test_an_address_is_taken_apart() -> None:
    url = "rediss+sentinel://u:p@h1:1,[2001:db8::1]/mymaster?db=2&ssl_ca_certs=ca.pem"
    spread = address.parse_spread(url)
    assert spread is not None
    assert spread.seeds == (("h1", 1), ("2001:db8::1", 26379))
    assert (spread.master, spread.db, spread.tls) == ("mymaster", 2, True)
    v6 = spread.seeds[1]
    assert spread.url_of(v6) == "rediss://u:p@[2001:db8::1]:26379/2?ssl_ca_certs=ca.pem"
    assert spread.sentinel_url_of(v6) == "rediss://[2001:db8::1]:26379?ssl_ca_certs=ca.pem"
    assert address.redacted(url).startswith("rediss+sentinel://u:***@h1")
    assert address.parse_spread("redis://h/0") is None
    assert not address.is_loopback("redis+cluster://127.0.0.1:1,h2:1")
    assert address.is_loopback("redis+cluster://127.0.0.1:1,[::1]:1,localhost")
