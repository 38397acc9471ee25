"""Least rights: what each role's Redis user may do, and what it is refused, by a real server.

That each role can do all its work is proved by a whole run, see ``tests/e2e/test_acl_run.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, NoPermissionError, ResponseError

from ringasync.broker import access
from ringasync.broker.client import Broker
from ringasync.broker.core import SCRIPTS_DIR
from ringasync.broker.types import VersionInfo
from ringasync.errors import BrokerRefusedError, ConfigError
from tests.conftest import CONFIG_HASH, RedisServer
from tests.redis_process import redis_process

SHIPPED = Path(__file__).parents[2] / "deploy" / "redis"
PASSWORDS = {name: f"password-of-the-{name}" for name in (*access.ROLES, "admin")}
RUN, OTHER = "mine", "other"


def major(server: RedisServer) -> int:
    return int(server.version.split(".")[0])


@contextmanager
def guarded(server: RedisServer, folder: Path, run: str | None = None) -> Iterator[str]:
    """A server with a user for each role; yields its address."""
    users = folder / "users.acl"
    users.write_text(access.users(major(server), PASSWORDS, run))
    with redis_process(server.binary, folder, "--aclfile", str(users)) as port:
        yield f"redis://127.0.0.1:{port}/0"


@pytest.fixture(scope="module")
def guarded_url(
    redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    with guarded(redis_server, tmp_path_factory.mktemp("acl"), RUN) as url:
        yield url


def user(url: str, role: str) -> Redis:
    name = "default" if role == "admin" else access.USER_PREFIX + role
    return Redis.from_url(url, username=name, password=PASSWORDS[role])


async def broker_as(url: str, role: str) -> Broker:
    return await Broker.connect(
        url, RUN, username=access.USER_PREFIX + role, password=PASSWORDS[role]
    )


@pytest.mark.parametrize("version", [6, 7])
def test_the_shipped_files_are_what_the_code_says(version: int) -> None:
    remedy = f"ringasync acl --redis {version} > deploy/redis/users-{version}.acl"
    shipped = (SHIPPED / f"users-{version}.acl").read_text()
    assert shipped == access.users(version), remedy


def test_every_script_belongs_to_a_role_and_every_key_is_known() -> None:
    given = {name for role in access.ROLES.values() for name in role.scripts}
    assert given == {path.stem for path in SCRIPTS_DIR.glob("[a-z]*.lua")}
    assert access.script_keys() - access.known_key_names() == {"answer:", "bad:", "scratch"}
    assert access.known_key_names() - access.script_keys() == {"sim_now"}


def test_no_call_in_a_script_is_overlooked() -> None:
    """Commands are read out of the Lua text: each call there names its command as a literal."""
    for path in SCRIPTS_DIR.glob("*.lua"):
        code = re.sub(r"--[^\n]*", "", path.read_text())
        calls = re.findall(r"(?<![\w.])p?call\(([^,)]*)|redis\.p?call\(([^,)]*)", code)
        assert [c for c in calls if not re.fullmatch(r"'[A-Z]+'", c[0] or c[1])] == [], path.name


REFUSED = [
    ("worker", ("HSET", "batch:1", "state", "trained")),
    ("worker", ("ZADD", "batches", "1", "b")),
    ("worker", ("HSET", "lock:learner", "token", "9")),
    ("worker", ("HSET", "lock:coordinator", "token", "9")),
    ("worker", ("SET", "w:v1:model:0", "weights")),
    ("worker", ("UNLINK", "w:v1")),
    ("worker", ("XRANGE", "outcomes", "-", "+")),
    ("grader", ("HGET", "manifests", "1")),
    ("grader", ("HSET", "versions", "1", "1:1")),
    ("grader", ("HSET", "batch:1", "state", "trained")),
    ("grader", ("GET", "w:v1:model:0")),
    ("learner", ("HSET", "lock:coordinator", "token", "9")),
    ("learner", ("XREADGROUP", "GROUP", "ring", "l", "STREAMS", "tickets", ">")),
    ("coordinator", ("HSET", "lock:learner", "token", "9")),
    ("coordinator", ("ZADD", "batches", "1", "b")),
    ("coordinator", ("SET", "w:v1:model:0", "weights")),
    ("operator", ("RPUSH", "seg:g000001.0", "tokens")),
    ("operator", ("XADD", "tickets", "*", "rollout", "g000001.0")),
]
REFUSED_ON_7 = [
    ("worker", ("HSET", "manifests", "1", "{}")),
    ("worker", ("HSET", "versions", "1", "1:1")),
    ("worker", ("DEL", "w:v1:model:0")),
    ("coordinator", ("HSET", "manifests", "1", "{}")),
    ("coordinator", ("HSET", "versions", "1", "1:1")),
]
"""Redis 6 cannot tell reading a key from writing it."""


async def run_raw(client: Redis, prefix: str, command: tuple[str, ...]) -> None:
    name, *rest = command
    if name == "XREADGROUP":
        rest[-2] = prefix + rest[-2]
    else:
        rest[0] = prefix + rest[0]
    await client.execute_command(name, *rest)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(("role", "command"), [*REFUSED, *REFUSED_ON_7], ids=str)
async def test_a_role_is_refused_what_it_must_not_do(
    guarded_url: str, redis_server: RedisServer, role: str, command: tuple[str, ...]
) -> None:
    if (role, command) in REFUSED_ON_7 and major(redis_server) < 7:
        pytest.skip("needs Redis 7: 6 cannot tell reading a key from writing it")
    async with user(guarded_url, role) as client:
        with pytest.raises(NoPermissionError):
            await run_raw(client, f"ring:{{{RUN}}}:", command)


@pytest.mark.parametrize("role", access.ROLES)
async def test_no_role_administers_redis_or_touches_another_run(
    guarded_url: str, role: str
) -> None:
    administration = [
        ("FLUSHALL",),
        ("CONFIG", "SET", "maxmemory-policy", "allkeys-lru"),
        ("SHUTDOWN",),
        ("ACL", "LIST"),
        ("KEYS", "*"),
        ("EVAL", "return 1", "0"),
        ("REPLICAOF", "NO", "ONE"),
        ("MODULE", "LIST"),
        ("HGETALL", f"ring:{{{OTHER}}}:meta"),
        ("HSET", f"ring:{{{OTHER}}}:meta", "phase", "done"),
        ("HGETALL", "unrelated"),
    ]
    async with user(guarded_url, role) as client:
        for command in administration:
            with pytest.raises(NoPermissionError):
                await client.execute_command(*command)  # type: ignore[no-untyped-call]


async def test_a_script_runs_with_the_rights_of_its_caller(guarded_url: str) -> None:
    """`SCRIPT LOAD` and `EVALSHA` give nobody more than the plain commands do."""
    async with user(guarded_url, "worker") as client:
        prefix = f"ring:{{{RUN}}}:"
        lua = "return redis.call('HSET', KEYS[1] .. 'batch:1', 'state', 'trained')"
        digest = await client.script_load(lua)
        with pytest.raises(ResponseError, match=r"(?i)acl|user executing the script"):
            await client.evalsha(digest, 1, prefix)
    async with user(guarded_url, "admin") as admin:
        assert not await admin.exists(prefix + "batch:1")


async def test_without_a_password_or_with_another_roles_nobody_gets_in(guarded_url: str) -> None:
    for name, password in (
        (None, None),
        ("ring-learner", PASSWORDS["worker"]),
        ("default", PASSWORDS["operator"]),
    ):
        with pytest.raises(BrokerRefusedError, match="RINGASYNC_REDIS_PASSWORD"):
            await Broker.connect(guarded_url, RUN, username=name, password=password)


async def test_a_role_under_the_wrong_user_is_told_so(guarded_url: str) -> None:
    coordinator = await broker_as(guarded_url, "coordinator")
    await coordinator.create_run("", CONFIG_HASH)
    worker = await broker_as(guarded_url, "worker")
    with pytest.raises(BrokerRefusedError, match=r"ACL user.*`ringasync acl`"):
        await worker.acquire_lock("learner", "w", 1000)
    with pytest.raises(BrokerRefusedError, match=r"ACL user.*`ringasync acl`"):
        await worker.batches()
    learner = await broker_as(guarded_url, "learner")
    fence = await learner.acquire_lock("learner", "l", 60_000)
    await learner.publish(fence, VersionInfo(1, 0, 0, "{}"))
    with pytest.raises(BrokerRefusedError, match="ACL user"):
        await worker.publish(fence, VersionInfo(2, 0, 0, "{}"))
    assert (await worker.version()) == VersionInfo(1, 0, 0, "{}")
    for broker in (coordinator, worker, learner):
        await broker.close()


async def test_a_role_without_a_password_cannot_log_in(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    users = tmp_path / "users.acl"
    users.write_text(access.users(major(redis_server), {"worker": PASSWORDS["worker"]}))
    with redis_process(redis_server.binary, tmp_path, "--aclfile", str(users)) as port:
        url = f"redis://127.0.0.1:{port}/0"
        async with user(url, "worker") as client:
            assert await client.ping()
        for role in ("learner", "admin"):
            async with user(url, role) as client:
                with pytest.raises(AuthenticationError):
                    await client.ping()


def test_short_and_shared_passwords_are_refused() -> None:
    with pytest.raises(ConfigError, match="'worker' has 5 characters, at least 16"):
        access.users(7, {"worker": "short"})
    with pytest.raises(ConfigError, match="one of its own"):
        access.users(7, dict.fromkeys(("worker", "learner"), "a-long-enough-password"))
    text = access.users(7, PASSWORDS)
    assert not [password for password in PASSWORDS.values() if password in text]
