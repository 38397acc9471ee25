"""Connecting to Redis: retries that say so, and the checks a broker must pass before use."""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

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
                if (refused := _tls_refusal(error)) is not None:
                    raise BrokerRefusedError(
                        f"no TLS with Redis at {self._where} ({refused}): redis.tls_ca_file must "
                        "hold the CA of its certificate, which must be for this host name"
                    ) from error
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


def require_password(url: str, password: str | None, setting: str, variable: str) -> None:
    """Raise ``BrokerRefusedError`` for an address beyond this machine without a password."""
    parts = urlsplit(url)
    if not is_loopback(url) and not password and not parts.password:
        raise BrokerRefusedError(
            f"Redis at {redacted(url)} ({setting}) is reachable from other machines and no "
            f"password is given: set {variable} (and `requirepass` or ACL users on the server)"
        )


_TLS_FILES = {
    "ssl_ca_certs": "tls_ca_file",
    "ssl_certfile": "tls_cert_file",
    "ssl_keyfile": "tls_key_file",
}
"""redis-py's options in an address -> our settings."""


def with_tls(url: str, ca_file: str, cert_file: str, key_file: str) -> str:
    """The address with the TLS files of the settings in it, so that roles and tools share them.

    Raises ``BrokerRefusedError`` when there are such files and the address is not ``rediss://``.
    """
    values = zip(_TLS_FILES, (ca_file, cert_file, key_file), strict=True)
    given = {option: value for option, value in values if value}
    if not given:
        return url
    parts = urlsplit(url)
    if parts.scheme != "rediss":
        raise BrokerRefusedError(
            f"redis.{_TLS_FILES[next(iter(given))]} is set, but {redacted(url)!r} does not use "
            "TLS: write rediss://HOST:PORT/0"
        )
    query = urlencode(dict(parse_qsl(parts.query)) | given)
    return urlunsplit(parts._replace(query=query))


def _check_address(url: str) -> None:
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
    for option, value in parse_qsl(parts.query):
        if option in _TLS_FILES and not Path(value).is_file():
            raise BrokerRefusedError(
                f"redis.{_TLS_FILES[option]} = {value!r} is no file on this machine"
            )
        if option.startswith("ssl_") and option not in _TLS_FILES:
            raise BrokerRefusedError(
                f"redis.url {where!r} sets {option}, which could switch the check of the server's "
                f"certificate off: only {', '.join(_TLS_FILES)} are allowed"
            )


async def open_client(
    url: str,
    *,
    username: str | None = None,
    password: str | None = None,
    connect_timeout_s: float = 5.0,
    retry_budget_s: float = 60.0,
) -> aredis.Redis:
    """Connect to a Redis that is fit to be a broker.

    Raises ``BrokerUnreachableError`` once the retry budget is spent, ``BrokerRefusedError`` for a
    wrong password, a certificate that is not trusted, a version below 6.2, an eviction policy, or
    a server that others can reach without a password.
    """
    where = redacted(url)
    _check_address(url)
    require_password(url, password, "redis.url", "RINGASYNC_REDIS_PASSWORD")
    given = {"username": username, "password": password}
    client: aredis.Redis = aredis.from_url(
        url,
        socket_connect_timeout=connect_timeout_s,
        socket_timeout=max(15.0, connect_timeout_s),
        retry=SpokenRetry(retry_budget_s, where),
        health_check_interval=30,
        **{name: value for name, value in given.items() if value},
    )
    try:
        await _check(client, where)
        await _check_exposure(client, url, password or urlsplit(url).password)
    except BaseException:
        await client.aclose()
        raise
    return client


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
    beyond = [a for a in (found.get("bind") or "").split() if not _is_loopback_bind(a)]
    if found.get("protected-mode") == "no" and (beyond or not found.get("bind")):
        interfaces = " ".join(beyond) or "all interfaces"
        raise _open_to_all(redacted(url), f"bind {interfaces}, protected-mode no, no password")


def _open_to_all(where: str, why: str) -> BrokerRefusedError:
    return BrokerRefusedError(
        f"Redis at {where} can be used from other machines without a password ({why}): set "
        "`requirepass` or ACL users (`ringasync acl`) there and RINGASYNC_REDIS_PASSWORD here, or "
        "`bind 127.0.0.1`"
    )


def _is_loopback_bind(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.lstrip("-")).is_loopback
    except ValueError:
        return False


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
    unknown = urlsplit(where).scheme == "rediss" and "ssl_certfile" not in where
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
        "server's `requirepass`, or to that of the ACL user in RINGASYNC_REDIS_USERNAME"
    )
