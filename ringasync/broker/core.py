"""The base of the broker client: the connection, the scripts and how their refusals are raised."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final, NoReturn, Self, TypeVar, cast

import redis.asyncio as aredis
import structlog
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError, NoScriptError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from ringasync.broker import connection
from ringasync.broker.address import redacted
from ringasync.broker.keys import Keys
from ringasync.broker.types import Fence
from ringasync.errors import (
    BrokerRefusedError,
    FencedError,
    IncarnationError,
    InvariantError,
    JoinRefusedError,
    LockHeldError,
    RingError,
    SchemaError,
    SessionLostError,
    WeightError,
)

SCRIPTS_DIR: Final = Path(__file__).with_name("scripts")
_REFUSED_BY_ACL = ("NOPERM", "user executing the script", "ACL failure in script")
"""What Redis says to a command outside of the user's rights: itself, inside a script 6.2, 7."""
_LOADS = 5
Arg = str | bytes | int
T = TypeVar("T")
_NO_LOG_PAUSE_S: Final = 0.5

log = structlog.get_logger(__name__)


@cache
def script_source(name: str, simulated: bool) -> bytes:
    """Lua text of one script: clock mode, prelude, group helpers if it uses them, body."""
    body = (SCRIPTS_DIR / f"{name}.lua").read_bytes()
    parts = [f"local SIMULATED = {'true' if simulated else 'false'}\n".encode()]
    parts.append((SCRIPTS_DIR / "_prelude.lua").read_bytes())
    if body.startswith(b"-- uses: groups"):
        parts.append((SCRIPTS_DIR / "_groups.lua").read_bytes())
    return b"".join([*parts, body])


@cache
def _digest(name: str, simulated: bool) -> str:
    return hashlib.sha1(script_source(name, simulated), usedforsecurity=False).hexdigest()


def text(value: Any) -> str:
    """A reply element as text."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def pairs(reply: Any) -> dict[str, str]:
    """An HGETALL reply, as a map or a flat list, as a dictionary of text."""
    items = reply.items() if isinstance(reply, dict) else zip(reply[::2], reply[1::2], strict=True)
    return {text(key): text(value) for key, value in items}


class BrokerCore:
    """One connection pool to the broker of one run, bound to the run's keys."""

    def __init__(
        self, client: aredis.Redis, run: str, url: str, budget_s: float, simulated_clock: bool
    ) -> None:
        self._client = client
        self._where = redacted(url)
        self._budget_s = budget_s
        self._simulated = simulated_clock
        self._seed = ""
        self._accepted_seen = 0
        self._run_seen = False
        self.run = run
        self.keys = Keys(run)

    @classmethod
    async def connect(
        cls,
        url: str,
        run: str,
        *,
        username: str | None = None,
        password: str | None = None,
        sentinel_password: str | None = None,
        connect_timeout_s: float = 5.0,
        retry_budget_s: float = 60.0,
        simulated_clock: bool = False,
    ) -> Self:
        """Connect and check that this Redis may be used; see ``connection.open_client``."""
        Keys(run)
        client = await connection.open_client(
            url,
            run,
            username=username,
            password=password,
            sentinel_password=sentinel_password,
            connect_timeout_s=connect_timeout_s,
            retry_budget_s=retry_budget_s,
        )
        return cls(client, run, url, retry_budget_s, simulated_clock)

    async def close(self) -> None:
        """Close the connections; the run stays as it is."""
        await self._client.aclose()

    @property
    def client(self) -> aredis.Redis:
        """The redis-py client, for tools and tests that read keys by hand."""
        return self._client

    async def _script(self, name: str, *args: Arg) -> Any:
        """Run one script atomically and raise its refusal, if any.

        A Redis that cannot write its log (a full disk) refuses a script's first write, so nothing
        has changed: it is tried again within the retry budget, as one that does not answer is.
        """
        began_s, said_s = time.monotonic(), float("-inf")
        while True:
            try:
                return await self._script_once(name, *args)
            except BrokerRefusedError as error:
                now_s = time.monotonic()
                if connection.NO_LOG not in str(error) or now_s - began_s >= self._budget_s:
                    raise
                if now_s - said_s >= connection.SAY_EVERY_S:
                    said_s = now_s
                    log.warning(
                        "redis cannot write to its disk, retrying",
                        waited_s=round(now_s - began_s, 1),
                        budget_s=self._budget_s,
                        error=str(error),
                    )
                await asyncio.sleep(_NO_LOG_PAUSE_S)

    async def _script_once(self, name: str, *args: Arg) -> Any:
        digest = _digest(name, self._simulated)
        call: list[Any] = ["EVALSHA", digest, 1, self.keys.prefix, *args]
        try:
            reply = await self._loaded(name, call)
        except (RedisConnectionError, RedisTimeoutError, OSError) as error:
            raise connection.unreachable(self._where, self._budget_s, error) from error
        except ResponseError as error:
            if connection.NO_LOG in str(error):
                raise self._read_only(name, str(error)) from error
            if any(said in str(error) for said in _REFUSED_BY_ACL):
                raise self._not_allowed(name, error) from error
            raise InvariantError(f"broker script {name} failed: {error}") from error
        first = reply[0] if isinstance(reply, list) and reply else None
        if isinstance(first, bytes) and first.startswith(b"!"):
            self._refuse(name, [text(part) for part in reply])
        return reply

    async def _loaded(self, name: str, call: Sequence[Any]) -> Any:
        """Run a script, and load it where it is not known.

        That may be twice: the server that it was loaded into may be another one a moment later.
        """
        for _ in range(_LOADS):
            try:
                return await self._execute(*call)
            except NoScriptError:
                await self._client.script_load(
                    cast(str, script_source(name, self._simulated))  # bytes are taken as they are
                )
        return await self._execute(*call)

    def _refuse(self, script: str, reply: Sequence[str]) -> NoReturn:
        code, rest = reply[0], list(reply[1:])
        if code == "!FENCED":
            role, token, owner = rest
            holder = f"{owner} holds token {token}" if owner else "nobody holds it"
            raise FencedError(f"{script}: this process lost the role {role!r}: {holder}")
        if code == "!NOSESSION":
            raise SessionLostError(f"{script}: session {rest[0]} has ended: open a new one")
        if code == "!NORUN":
            raise self._no_run()
        if code == "!WEIGHT":
            raise WeightError(rest[0])
        if code == "!HELD":
            raise LockHeldError(rest[0], rest[1], int(rest[2]))
        if code == "!JOIN":
            raise JoinRefusedError(join_refusal(self.run, *rest))
        if code == "!DUPLICATE":
            raise InvariantError(f"{script}: group {rest[0]} was fed before")
        if code == "!REDIS":
            raise self._read_only(script, rest[0])
        raise InvariantError(f"{script}: {' '.join(rest)}")

    def _read_only(self, script: str, why: str) -> BrokerRefusedError:
        return BrokerRefusedError(
            f"{script}: Redis at {self._where} refuses writes ({why}): free memory or disk space "
            "there, or raise maxmemory"
        )

    def _not_allowed(self, what: str, error: Exception) -> BrokerRefusedError:
        return BrokerRefusedError(
            f"{what}: Redis at {self._where} does not allow this to our ACL user ({error}): log in "
            "as the user of this role, or renew the server's ACL file by `ringasync acl`"
        )

    def _saw_accepted(self, accepted: int) -> None:
        """Remember how much was accepted: what is gone after a rollback was lost."""
        self._accepted_seen = max(self._accepted_seen, accepted)

    def _no_run(self) -> RingError:
        """The run is not there: never was, or went while this process took part in it."""
        if self._run_seen:
            return IncarnationError(
                f"run {self.run!r} vanished from Redis at {self._where} (it came back empty, or "
                "the run was deleted): start afresh"
            )
        return RingError(
            f"run {self.run!r} does not exist at {self._where}: start its coordinator first"
        )

    async def _read(self, command: Awaitable[Any]) -> Any:
        """Await a plain read, with the same errors as a script."""
        try:
            return await _cancellable(command)
        except (RedisConnectionError, RedisTimeoutError, OSError) as error:
            raise connection.unreachable(self._where, self._budget_s, error) from error
        except NoPermissionError as error:
            raise self._not_allowed("a read", error) from error

    async def _hash(self, key: str) -> dict[str, str]:
        return pairs(await self._read(self._client.hgetall(key)))

    async def _execute(self, *command: Any) -> Any:
        execute: Callable[..., Awaitable[Any]] = self._client.execute_command
        return await _cancellable(execute(*command))


async def _cancellable(command: Awaitable[Any]) -> Any:
    """Await a command without losing a cancellation.

    Below Python 3.12 ``asyncio.wait_for``, which redis-py uses for every write, swallows a
    cancellation that arrives in the moment in which the write ends: a role told to stop would
    go on.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    reply = await command
    if task and task.cancelling() > before:
        raise asyncio.CancelledError
    return reply


def join_refusal(run: str, what: str, theirs: str, ours: str) -> str:
    """Why a role may not join, with both versions and the remedy."""
    remedy = (
        "use the same build of ringasync as the coordinator"
        if what == "schema"
        else "use the configuration the run was started with, or another run.name"
    )
    return f"run {run!r} has {what} {theirs}, this process has {ours}: {remedy}"


def fence_args(fence: Fence) -> tuple[str, str]:
    """The two arguments every fenced script begins with."""
    return fence.role, str(fence.token)


def new_nonce() -> str:
    """Eight random bytes: makes lease tokens unique even after Redis lost its tail."""
    return secrets.token_hex(8)


def read_or_why(read: Callable[[bytes], T], raw: bytes) -> tuple[T | None, str]:
    """What a decoder makes of a field, or None and why it cannot: one group that somebody
    wrote over must not take down whoever reads it together with others."""
    try:
        return read(raw), ""
    except SchemaError as error:
        return None, str(error)


def compact(value: Any) -> str:
    """JSON without spaces."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
