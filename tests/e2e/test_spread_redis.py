"""Whole small runs on a Redis of several servers, which changes place in the middle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from ringasync.broker import access
from ringasync.broker.keys import Keys
from tests.conftest import RedisServer
from tests.e2e.test_acl_run import PASSWORDS, SECRETS, refusals
from tests.e2e.tiny_run import TinyRun, started, tiny_settings
from tests.spread_redis import HOST, Server, redis_cluster, sentinel_group

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

STEPS = 4


def accepted(server: Server) -> int:
    """Tokens that this server's copy of the run has accepted."""
    return int(server.ask("HGET", Keys("tiny").ledger, "accepted") or 0)


def small_settings(folder: Path, model: Path, **overrides: Any) -> dict[str, Any]:
    return tiny_settings(folder, model, learner__steps=STEPS, eval__prompts=8, **overrides)


def trains_and_balances(run: TinyRun) -> None:
    """Wait for the run's end."""
    assert run.wait(150) == 0, run.tail()
    summary = run.summary()
    assert summary["ledger_balanced"] is True
    assert summary["steps"] == STEPS


def test_a_failover_that_loses_the_tail_in_the_middle_of_a_run(
    tiny_model: Path, tmp_path: Path, any_redis: RedisServer
) -> None:
    with sentinel_group(any_redis.binary, tmp_path / "redis") as group:
        first, second = group.servers
        settings = small_settings(tmp_path, tiny_model, redis__url=group.url)
        with started(tmp_path, settings) as run:
            run.wait_until(lambda: accepted(first) > 300, "tokens")
            group.cut_replication()
            kept = accepted(second)
            run.wait_until(lambda: accepted(first) > kept + 100, "tokens that will be lost")
            first.kill()
            trains_and_balances(run)
        assert group.primary() is second
        assert int(second.ask("HGET", Keys("tiny").meta, "incarnation")) > 1
        assert int(second.ask("HGET", Keys("tiny").ledger, "trained")) > kept
        assert "redis does not answer, retrying" in run.tail()


def test_a_slot_moves_in_the_middle_of_a_run_with_users_of_the_roles(
    tiny_model: Path, tmp_path: Path, any_redis: RedisServer
) -> None:
    users = tmp_path / "users.acl"
    users.write_text(access.users(int(any_redis.version.split(".")[0]), PASSWORDS, "tiny"))
    arguments = ("--aclfile", str(users))
    login = {"password": PASSWORDS["admin"]}
    with redis_cluster(any_redis.binary, tmp_path / "redis", *arguments, login=login) as cluster:
        settings = small_settings(
            tmp_path, tiny_model, redis__url=cluster.url, weights__transport="redis"
        )
        with started(tmp_path, settings, **SECRETS) as run:
            before = cluster.owner("tiny")
            run.wait_until(lambda: accepted(before) > 300, "tokens")
            after = cluster.migrate("tiny")
            trains_and_balances(run)
        assert after is not before
        assert int(after.ask("HGET", Keys("tiny").meta, "incarnation")) > 1
        assert before.ask("DBSIZE") == 0
        for node in cluster.nodes:
            with Redis(HOST, node.port, password=PASSWORDS["admin"]) as admin:
                assert refusals(admin) == []
