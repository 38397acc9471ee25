"""Connecting to Redis: retries that say so, and the checks a broker must pass before use."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit, urlunsplit

import redis.asyncio as aredis
import structlog
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff, NoBackoff
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

from ringasync.broker.address import (
    check_address,
    is_loopback,
    is_loopback_ip,
    redacted,
    require_password,
    uses_tls,
)
from ringasync.broker.primaries import SENTINEL_VARIABLE, primary_client
from ringasync.errors import BrokerRefusedError, BrokerUnreachableError

log = structlog.get_logger(__name__)

MIN_VERSION = (6, 2)
SAY_EVERY_S = 5.0
"""A role that waits for Redis says so at once and then this often."""
_RETRIED = (RedisConnectionError, RedisTimeoutError, BusyLoadingError, ReadOnlyError, OSError)
NO_LOG: Final = "MISCONF"
"""How Redis names its refusal to write while its log or snapshot cannot be written. 6.2 refuses a
PING too, which redis-py sends before the first command of a connection."""
_T = TypeVar("_T")


class SpokenRetry(Retry):
    """redis-py's retry with a time budget instead of a count, and with a voice.

    Every command may be repeated: the broker's scripts answer a repeat as they did the first. A
    Redis whose disk is full is waited for like one that does not answer.
    Wrong passwords are not retried. A try counts for half the budget at most, so that a process
    that stood still (SIGSTOP, a paused machine) in the middle of one does not take that for
    Redis's silence: it asks again.
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
        counted_s, waited_s, said, failures = time.monotonic(), 0.0, 0.0, 0
        while True:
            try:
                return await do()
            except (*_RETRIED, ResponseError) as error:
                no_log = NO_LOG in str(error)
                if not no_log and not isinstance(error, _RETRIED):
                    raise
                if isinstance(error, (AuthenticationError, AuthorizationError)) or (
                    is_retryable and not is_retryable(error)
                ):
                    raise
                if (refused := _tls_refusal(error)) is not None:
                    raise BrokerRefusedError(
                        f"no TLS with Redis at {self._where} ({refused}): redis.tls_ca_file must "
                        "hold the CA of its certificate, which must be for this host name"
                    ) from error
                failures += 1
                await (fail(error, failures) if with_failure_count else fail(error))
                now_s = time.monotonic()
                waited_s += min(now_s - counted_s, self._budget_s / 2)
                counted_s = now_s
                if waited_s >= self._budget_s:
                    raise
                if failures == 1 or waited_s - said >= SAY_EVERY_S:
                    said = waited_s
                    what = "cannot write to its disk" if no_log else "does not answer"
                    log.warning(
                        f"redis {what}, retrying",
                        redis=self._where,
                        waited_s=round(waited_s, 1),
                        budget_s=self._budget_s,
                        error=str(error) or type(error).__name__,
                    )
                await asyncio.sleep(self._backoff.compute(min(failures, 16)))


async def open_client(
    url: str,
    run: str,
    *,
    username: str | None = None,
    password: str | None = None,
    sentinel_password: str | None = None,
    connect_timeout_s: float = 5.0,
    retry_budget_s: float = 60.0,
) -> aredis.Redis:
    """Connect to a Redis that is fit to be a broker.

    Raises ``BrokerUnreachableError`` once the retry budget is spent, ``BrokerRefusedError`` for a
    wrong password, a certificate that is not trusted, a version below 6.2, an eviction policy, or
    a server that others can reach without a password.
    """
    where = redacted(url)
    spread = check_address(url)
    require_password(url, password, "redis.url", "RINGASYNC_REDIS_PASSWORD")
    options: dict[str, Any] = {
        "socket_connect_timeout": connect_timeout_s,
        "socket_timeout": max(15.0, connect_timeout_s),
    }
    given = {"username": username, "password": password}
    login = {name: value for name, value in given.items() if value}
    lasting = options | {
        "retry": SpokenRetry(retry_budget_s, where),
        "health_check_interval": 30,
    }
    if spread is None:
        client: aredis.Redis = aredis.from_url(url, **lasting, **login)
        return await _fit(client, _judge(client, url, password))

    async def vet(plain: str) -> None:
        async with aredis.from_url(plain, **options, **login, retry=Retry(NoBackoff(), 0)) as one:
            await _vet(one, plain, password)

    for node in spread.seeds if spread.kind == "sentinel" else ():
        await _check_sentinel(spread.sentinel_url_of(node), sentinel_password)
    client = primary_client(
        spread,
        run,
        vet,
        username=username,
        password=password,
        sentinel_password=sentinel_password,
        **lasting | {"connect_timeout_s": connect_timeout_s},
    )
    return await _fit(client, _first_answer(client, where, retry_budget_s))


async def _fit(client: aredis.Redis, judgement: Awaitable[None]) -> aredis.Redis:
    try:
        await judgement
    except BaseException:
        await client.aclose()
        raise
    return client


async def _judge(client: aredis.Redis, url: str, password: str | None) -> None:
    await _check(client, redacted(url))
    await _check_exposure(client, url, password or urlsplit(url).password)


async def _vet(one: aredis.Redis, plain: str, password: str | None) -> None:
    """Judge a server that Sentinels or a cluster named; what may pass is an outage."""
    if (await one.info("replication")).get("role") != "master":
        raise RedisConnectionError(f"{redacted(plain)} is not the primary yet")
    try:
        await _judge(one, plain, password)
    except BrokerUnreachableError as error:
        raise RedisConnectionError(str(error)) from error


async def _first_answer(client: aredis.Redis, where: str, budget_s: float) -> None:
    with _explained(where, budget_s):
        await client.ping()


@contextmanager
def _explained(where: str, budget_s: float) -> Iterator[None]:
    """Within it redis-py's errors are ours, with the remedy."""
    try:
        yield
    except (AuthenticationError, AuthorizationError) as error:
        raise _wrong_password(where, error) from error
    except (RedisConnectionError, RedisTimeoutError, OSError) as error:
        raise unreachable(where, budget_s, error) from error
    except RedisError as error:
        raise BrokerRefusedError(f"Redis at {where} cannot be used: {error}") from error


async def _check_sentinel(url: str, password: str | None) -> None:
    """Whoever commands a Sentinel can send all roles to a Redis of his own."""
    if not is_loopback(url) and not password:
        raise BrokerRefusedError(
            f"the Sentinel at {url} is reachable from other machines and no password is given: "
            f"set {SENTINEL_VARIABLE} (and `requirepass` on the Sentinels)"
        )
    if not is_loopback(url):
        async with aredis.from_url(url, socket_connect_timeout=5, socket_timeout=5) as stranger:
            try:
                await stranger.ping()
            except (RedisError, OSError):
                return  # as it should be, or away: the others will do
        raise _open_to_all(url, "this Sentinel answers without a password")


async def _check_exposure(client: aredis.Redis, url: str, password: str | None) -> None:
    """Refuse a server that others can use without a password, whatever we ourselves log in with."""
    if not password:
        return await _check_open(client, url)
    parts = urlsplit(url)
    bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    stranger: aredis.Redis = aredis.from_url(bare, socket_connect_timeout=5, socket_timeout=5)
    try:
        await stranger.ping()
        await _check_open(stranger, url)
    except (RedisError, OSError):
        return  # as it should be
    finally:
        await stranger.aclose()


async def _check_open(stranger: aredis.Redis, url: str) -> None:
    """``stranger`` got in without a password: fine only where nobody else can."""
    if not is_loopback(url):
        raise _open_to_all(redacted(url), "it answers without a password")
    try:
        found: dict[str | None, str | None] = {}
        for name in ("bind", "protected-mode"):
            found |= await stranger.config_get(name)
    except RedisError:
        return  # a managed server that hides its settings
    beyond = [a for a in (found.get("bind") or "").split() if not is_loopback_ip(a.lstrip("-"))]
    if found.get("protected-mode") == "no" and (beyond or not found.get("bind")):
        interfaces = " ".join(beyond) or "all interfaces"
        raise _open_to_all(redacted(url), f"bind {interfaces}, protected-mode no, no password")


def _open_to_all(where: str, why: str) -> BrokerRefusedError:
    return BrokerRefusedError(
        f"Redis at {where} can be used from other machines without a password ({why}): set "
        "`requirepass` or ACL users (`ringasync acl`) there and RINGASYNC_REDIS_PASSWORD here, or "
        "`bind 127.0.0.1`"
    )


def _tls_refusal(error: BaseException | None) -> ssl.SSLError | None:
    """The TLS error behind this one, if trying again cannot mend it."""
    passing = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)
    while error is not None:
        if isinstance(error, ssl.SSLError) and not isinstance(error, passing):
            return error
        error = error.__cause__ or error.__context__
    return None


def unreachable(where: str, budget_s: float, error: Exception) -> BrokerUnreachableError:
    """The error a role ends with when Redis stayed silent, with the remedy."""
    # Under TLS 1.3 a server that misses our certificate just hangs up after the handshake.
    unknown = uses_tls(where) and "ssl_certfile" not in where
    ours = "; if it asks clients for a certificate, set redis.tls_cert_file and redis.tls_key_file"
    return BrokerUnreachableError(
        f"Redis at {where} did not answer for {budget_s:g} s "
        f"({str(error) or type(error).__name__}): "
        "start it, or correct redis.url; redis.retry_budget_s sets how long roles wait"
        + (ours if unknown else "")
    )


async def _check(client: aredis.Redis, where: str) -> None:
    retry = client.get_retry()
    budget_s = retry._budget_s if isinstance(retry, SpokenRetry) else 0.0
    with _explained(where, budget_s):
        try:
            info: dict[str, Any] = await client.info("server")
            memory: dict[str, Any] = await client.info("memory")
            persistence: dict[str, Any] = await client.info("persistence")
            replication: dict[str, Any] = await client.info("replication")
        except ResponseError as error:
            if "AUTH" in str(error).upper() or "password" in str(error):
                raise _wrong_password(where, error) from error
            raise BrokerRefusedError(f"Redis at {where} refused INFO: {error}") from error
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
        "server's `requirepass`, or to that of the ACL user in RINGASYNC_REDIS_USERNAME"
    )
