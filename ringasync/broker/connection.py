"""Connecting to Redis: retries that say so, and the checks a broker must pass before use."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

import redis.asyncio as aredis
import structlog
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from ringasync.errors import BrokerRefusedError, BrokerUnreachableError

log = structlog.get_logger(__name__)

MIN_VERSION = (6, 2)
_SAY_EVERY_S = 5.0
"""A role that waits for Redis says so at once and then this often."""
_RETRIED = (RedisConnectionError, RedisTimeoutError, BusyLoadingError, ReadOnlyError, OSError)
_T = TypeVar("_T")


class SpokenRetry(Retry):
    """redis-py's retry with a time budget instead of a count, and with a voice.

    Every command may be repeated: the broker's scripts answer a repeat as they did the first.
    Wrong passwords are not retried.
    """

    def __init__(self, budget_s: float, where: str) -> None:
        super().__init__(ExponentialBackoff(cap=1.0, base=0.05), retries=-1)
        self._budget_s, self._where = budget_s, where

    async def call_with_retry(
        self,
        do: Callable[[], Awaitable[_T]],
        fail: Callable[..., Awaitable[Any]],
        is_retryable: Callable[[Exception], bool] | None = None,
        with_failure_count: bool = False,
    ) -> _T:
        """Run ``do`` until it answers or the budget is spent; then raise its last error."""
        began, said, failures = time.monotonic(), 0.0, 0
        while True:
            try:
                return await do()
            except _RETRIED as error:
                if isinstance(error, (AuthenticationError, AuthorizationError)) or (
                    is_retryable and not is_retryable(error)
                ):
                    raise
                failures += 1
                await (fail(error, failures) if with_failure_count else fail(error))
                waited_s = time.monotonic() - began
                if waited_s >= self._budget_s:
                    raise
                if failures == 1 or waited_s - said >= _SAY_EVERY_S:
                    said = waited_s
                    log.warning(
                        "redis does not answer, retrying",
                        redis=self._where,
                        waited_s=round(waited_s, 1),
                        budget_s=self._budget_s,
                        error=str(error) or type(error).__name__,
                    )
                await asyncio.sleep(self._backoff.compute(min(failures, 16)))


def redacted(url: str) -> str:
    """The URL without its password, for logs and errors."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    return url.replace(f":{parts.password}@", ":***@")


def is_loopback(url: str) -> bool:
    """Whether only processes of this machine can reach the address."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return True
    host = parts.hostname or "localhost"
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def open_client(
    url: str,
    *,
    password: str | None = None,
    connect_timeout_s: float = 5.0,
    retry_budget_s: float = 60.0,
) -> aredis.Redis:
    """Connect to a Redis that is fit to be a broker.

    Raises ``BrokerUnreachableError`` once the retry budget is spent, ``BrokerRefusedError`` for a
    wrong password, a version below 6.2, an eviction policy, or an open address without password.
    """
    where = redacted(url)
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise BrokerRefusedError(f"redis.url {where!r} is not a Redis address: {error}") from error
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise BrokerRefusedError(
            f"redis.url {where!r} must begin with redis://, rediss:// or unix://"
        )
    if not is_loopback(url) and not password and not parts.password:
        raise BrokerRefusedError(
            f"Redis at {where} is reachable from other machines and no password is given: set "
            "RINGASYNC_REDIS_PASSWORD (and `requirepass` on the server)"
        )
    options: dict[str, Any] = {"password": password} if password else {}
    client: aredis.Redis = aredis.from_url(
        url,
        socket_connect_timeout=connect_timeout_s,
        socket_timeout=max(15.0, connect_timeout_s),
        retry=SpokenRetry(retry_budget_s, where),
        health_check_interval=30,
        **options,
    )
    try:
        await _check(client, where)
    except BaseException:
        await client.aclose()
        raise
    return client


def unreachable(where: str, budget_s: float, error: Exception) -> BrokerUnreachableError:
    """The error a role ends with when Redis stayed silent, with the remedy."""
    return BrokerUnreachableError(
        f"Redis at {where} did not answer for {budget_s:g} s "
        f"({str(error) or type(error).__name__}): "
        "start it, or correct redis.url; redis.retry_budget_s sets how long roles wait"
    )


async def _check(client: aredis.Redis, where: str) -> None:
    retry = client.get_retry()
    budget_s = retry._budget_s if isinstance(retry, SpokenRetry) else 0.0
    try:
        info: dict[str, Any] = await client.info("server")
        memory: dict[str, Any] = await client.info("memory")
        persistence: dict[str, Any] = await client.info("persistence")
        replication: dict[str, Any] = await client.info("replication")
    except (AuthenticationError, AuthorizationError) as error:
        raise _wrong_password(where, error) from error
    except ResponseError as error:
        if "AUTH" in str(error).upper() or "password" in str(error):
            raise _wrong_password(where, error) from error
        raise BrokerRefusedError(f"Redis at {where} refused INFO: {error}") from error
    except (RedisConnectionError, RedisTimeoutError, OSError) as error:
        raise unreachable(where, budget_s, error) from error
    except RedisError as error:
        raise BrokerRefusedError(f"Redis at {where} cannot be used: {error}") from error
    check_server(where, info, memory, replication)
    if not persistence.get("aof_enabled"):
        log.warning(
            "redis keeps no append-only file: a restart loses everything since the last snapshot",
            redis=where,
            remedy="appendonly yes",
        )


def check_server(
    where: str, info: dict[str, Any], memory: dict[str, Any], replication: dict[str, Any]
) -> None:
    """Judge what INFO says. Raises ``BrokerRefusedError`` with the remedy."""
    version = str(info.get("redis_version", "0"))
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < MIN_VERSION:
        raise BrokerRefusedError(
            f"Redis at {where} is version {version}, 6.2 or later is needed: upgrade it"
        )
    policy = str(memory.get("maxmemory_policy", "noeviction"))
    if policy != "noeviction":
        raise BrokerRefusedError(
            f"Redis at {where} evicts keys (maxmemory-policy {policy}), which would lose tokens: "
            "run `redis-cli CONFIG SET maxmemory-policy noeviction` or set it in redis.conf"
        )
    if replication.get("role") not in (None, "master"):
        raise BrokerRefusedError(
            f"Redis at {where} is a {replication.get('role')}: give the address of the primary"
        )


def _wrong_password(where: str, error: Exception) -> BrokerRefusedError:
    return BrokerRefusedError(
        f"Redis at {where} refused the password ({error}): set RINGASYNC_REDIS_PASSWORD to the "
        "server's `requirepass`"
    )
