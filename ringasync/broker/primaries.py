"""A client of whichever server holds a run now: behind Sentinels, or one node of a cluster.

All keys of a run share a hash tag, so one server at a time holds it whole, and a plain client of
that server does everything: scripts, pipelines, scans. What is added to it: before every
connection the server is asked for, and an answer that says "not here" (``MOVED``, ``READONLY``
and the like) closes the connection and counts as an outage, to be tried again within
``redis.retry_budget_s``. While a cluster moves the run's slot, its node refuses scripts with
``ASK``, because the key that stands for the run is nowhere: the run waits, and goes on at the new
node.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

import redis.asyncio as aredis
from redis.asyncio.connection import SSLConnection, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool, SentinelManagedConnection
from redis.backoff import NoBackoff
from redis.cluster import get_node_name
from redis.crc import key_slot
from redis.exceptions import (
    AskError,
    AuthenticationError,
    ClusterDownError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from ringasync.broker.address import Node, SpreadAddress
from ringasync.broker.keys import Keys
from ringasync.errors import BrokerRefusedError

Vet = Callable[[str], Awaitable[None]]
"""Judges the server at a plain address before it is used; raises what speaks against it."""

SENTINEL_VARIABLE: Final = "RINGASYNC_SENTINEL_PASSWORD"
_ELSEWHERE = (AskError, TryAgainError, ClusterDownError)
"""Redis's MOVED, ASK, TRYAGAIN, CLUSTERDOWN and MASTERDOWN, of which redis-py cuts the word off."""
_NOT_HERE = ("READONLY", "NOREPLICAS", "CLUSTERDOWN", "non local key")
"""What else a server says that may not write now: by itself or, on 6.2, out of a script."""


class PrimaryConnection(SentinelManagedConnection):
    """A connection to the server that its pool finds; one more outage when that has changed."""

    async def connect_check_health(
        self, check_health: bool = True, retry_socket_connect: bool = True
    ) -> None:
        """As redis-py's, which before a command would connect to the old server for ever."""
        if retry_socket_connect:
            await self.connect()  # type: ignore[no-untyped-call]
            return
        await super().connect_check_health(check_health, retry_socket_connect)

    async def read_response(self, *args: Any, **options: Any) -> Any:
        """As redis-py's. Raises its ``ConnectionError`` for an answer that says "not here"."""
        try:
            reply = await super().read_response(*args, **options)
        except ResponseError as error:
            elsewhere = isinstance(error, _ELSEWHERE)
            if not elsewhere and not any(said in str(error) for said in _NOT_HERE):
                raise
            raise await self._left(f"{type(error).__name__}: {error}") from error
        if isinstance(reply, list) and len(reply) == 2 and reply[0] == b"!REDIS":
            why = _text(reply[1])  # a script that asks before it writes
            if any(said in why for said in _NOT_HERE):
                raise await self._left(why)
        return reply

    async def _left(self, why: str) -> RedisConnectionError:
        await self.disconnect()
        at = get_node_name(self.host, self.port)
        return RedisConnectionError(f"{at} does not hold the run now ({why})")


class PrimarySSLConnection(PrimaryConnection, SSLConnection):
    """The same over TLS."""


class _Sentinels(Sentinel):
    """Asks Sentinels for the primary; the connections to them last for one question."""

    def __init__(self, address: SpreadAddress, password: str | None, timeout_s: float) -> None:
        options = _options(address.sentinel_url_of(address.seeds[0]), timeout_s, None, password)
        super().__init__(address.seeds, sentinel_kwargs=options)  # type: ignore[no-untyped-call]

    async def discover_master(self, service_name: str) -> Node:
        try:
            host, port = await super().discover_master(service_name)
        except RedisConnectionError as error:
            if AuthenticationError.__name__ in str(error):
                raise BrokerRefusedError(
                    f"a Sentinel refused the password ({error}): set {SENTINEL_VARIABLE} to the "
                    "Sentinels' `requirepass`"
                ) from error
            raise
        finally:
            await self.aclose()
        return str(host), int(port)


class _Slots:
    """Asks the nodes of a cluster which of them has the run's slot."""

    def __init__(self, address: SpreadAddress, run: str, options: dict[str, Any]) -> None:
        self._nodes = list(address.seeds)
        self._slot = key_slot(Keys(run).prefix.encode())
        self._options = options

    async def discover_master(self, service_name: str) -> Node:
        failures: list[str] = []
        last_error: Exception | None = None
        for node in list(self._nodes):
            try:
                slots = await self._slots_by(node)
            except AuthenticationError:
                raise
            except (RedisConnectionError, RedisTimeoutError, OSError) as error:
                failures.append(f"{get_node_name(*node)}: {error or type(error).__name__}")
                last_error = error
                continue
            # Whoever answers is asked first next time; nodes that joined later are asked too.
            known = [node, *(primary for _, _, primary in slots), *self._nodes]
            self._nodes = list(dict.fromkeys(known))
            for first, last, primary in slots:
                if first <= self._slot <= last:
                    return primary
            failures.append(f"{get_node_name(*node)}: nobody has slot {self._slot}")
        why = f"no node for {service_name}: {'; '.join(failures)}"
        raise RedisConnectionError(why) from last_error

    async def _slots_by(self, node: Node) -> list[tuple[int, int, Node]]:
        async with aredis.Redis(host=node[0], port=node[1], **self._options) as client:
            try:
                reply = await client.execute_command("CLUSTER SLOTS")  # type: ignore[no-untyped-call]
            except ResponseError as error:
                raise BrokerRefusedError(
                    f"redis.url names a Redis Cluster, but {get_node_name(*node)} says: {error}. "
                    "Write redis://HOST:PORT/0 for a single server; renew an ACL file by "
                    "`ringasync acl`"
                ) from error
        return [
            # A node that does not know its own address leaves it out.
            (int(first), int(last), (_text(primary[0]) or node[0], int(primary[1])))
            for first, last, primary, *_ in reply
        ]


class _Vetted:
    """What a pool asks for the primary: finds it, and judges it whenever it is another one."""

    def __init__(self, finder: _Sentinels | _Slots, address: SpreadAddress, vet: Vet) -> None:
        self._finder, self._address, self._vet = finder, address, vet
        self._fit: Node | None = None

    async def discover_master(self, service_name: str) -> Node:
        node = await self._finder.discover_master(service_name)
        if node != self._fit:
            await self._vet(self._address.url_of(node))
            self._fit = node
        return node


def primary_client(
    address: SpreadAddress,
    run: str,
    vet: Vet,
    *,
    username: str | None,
    password: str | None,
    sentinel_password: str | None,
    connect_timeout_s: float,
    **options: Any,
) -> aredis.Redis:
    """A client of the server that holds the run, wherever that goes; nothing is connected yet."""
    own = _options(address.url_of(address.seeds[0]), connect_timeout_s, username, password)
    finder = (
        _Sentinels(address, sentinel_password, connect_timeout_s)
        if address.kind == "sentinel"
        else _Slots(address, run, own)
    )
    pool = SentinelConnectionPool(  # type: ignore[no-untyped-call]
        address.master or f"the slot of run {run!r}",
        _Vetted(finder, address, vet),
        connection_class=PrimarySSLConnection if address.tls else PrimaryConnection,
        **{name: value for name, value in (own | options).items() if name != "ssl"},
    )
    return aredis.Redis.from_pool(pool)


def _options(
    url: str, timeout_s: float, username: str | None, password: str | None
) -> dict[str, Any]:
    """Arguments of a redis-py client, but for host and port, with no retry of its own."""
    options: dict[str, Any] = dict(parse_url(url))
    for name in ("host", "port"):
        options.pop(name, None)
    if options.pop("connection_class", None) is not None:
        options["ssl"] = True
    given = {"username": username, "password": password}
    return options | {
        "socket_connect_timeout": timeout_s,
        "socket_timeout": timeout_s,
        "retry": Retry(NoBackoff(), 0),
        **{name: value for name, value in given.items() if value},
    }


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
