"""Addresses of a Redis: one server, or several of which one at a time holds a run.

::

    redis://HOST:PORT/DB                               one server
    redis+sentinel://HOST:26379,HOST/MASTER?db=0       the primary that these Sentinels name
    redis+cluster://HOST:6379,HOST                     the node of a cluster that has the run's slot

``rediss``, ``rediss+sentinel`` and ``rediss+cluster`` are the same over TLS.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit, urlunsplit

from ringasync.errors import BrokerRefusedError

Node = tuple[str, int]
"""Host and port of one server."""

PLAIN_SCHEMES = ("redis", "rediss", "unix")
Kind = Literal["sentinel", "cluster"]
_KINDS: dict[str, Kind] = {"sentinel": "sentinel", "cluster": "cluster"}
_DEFAULT_PORT = {"sentinel": 26379, "cluster": 6379}
_FORM = {
    "sentinel": "redis+sentinel://HOST:26379,HOST:26379/MASTER?db=0",
    "cluster": "redis+cluster://HOST:6379,HOST:6379",
}


@dataclass(frozen=True, slots=True)
class SpreadAddress:
    """An address of several servers. ``master`` is the Sentinels' name for the primary."""

    kind: Kind
    tls: bool
    user: str
    """What stands before the ``@``, as it was written; may hold a password."""
    seeds: tuple[Node, ...]
    master: str
    db: int
    query: str
    """Options of a plain address, as TLS files."""

    def url_of(self, node: Node) -> str:
        """The plain address of one server, with the user, database and TLS of this one."""
        netloc = f"{self.user}@{_netloc(node)}" if self.user else _netloc(node)
        return urlunsplit((self._scheme, netloc, f"/{self.db}", self.query, ""))

    def sentinel_url_of(self, node: Node) -> str:
        """The plain address of one Sentinel: it has users and passwords of its own."""
        return urlunsplit((self._scheme, _netloc(node), "", self.query, ""))

    @property
    def _scheme(self) -> str:
        return "rediss" if self.tls else "redis"


def redacted(url: str) -> str:
    """The URL without its password, for logs and errors."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    return url.replace(f":{parts.password}@", ":***@")


def uses_tls(url: str) -> bool:
    """Whether the address asks for TLS."""
    return urlsplit(url).scheme.partition("+")[0] == "rediss"


def hosts_of(url: str) -> list[str]:
    """Hosts of a TCP address, without brackets; of one that names none, ``localhost``."""
    servers = urlsplit(url).netloc.rpartition("@")[2].split(",")
    return [urlsplit(f"//{server}").hostname or "localhost" for server in servers]


def parse_spread(url: str) -> SpreadAddress | None:
    """The address of Sentinels or a cluster; None for one server's.

    Raises ``BrokerRefusedError`` that names what is wrong and the form it should have.
    """
    parts = urlsplit(url)
    scheme, _, named = parts.scheme.partition("+")
    kind = _KINDS.get(named)
    if scheme not in ("redis", "rediss") or kind is None:
        return None

    def refused(why: str) -> BrokerRefusedError:
        return BrokerRefusedError(f"redis.url {redacted(url)!r} {why}: write {_FORM[kind]}")

    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    db, path = query.pop("db", "0"), parts.path.strip("/")
    if not db.isascii() or not db.isdigit():
        raise refused(f"has db {db!r}, which is no number")
    if kind == "cluster" and (path not in ("", "0") or int(db)):
        raise refused("names a database, but a Redis Cluster has only number 0")
    if kind == "sentinel" and (not path or "/" in path):
        raise refused("must name the Sentinels' master behind the hosts, as `mymaster`")
    seeds = tuple(_seeds(parts, kind, refused))
    tls, user = scheme == "rediss", parts.netloc.rpartition("@")[0]
    master = path if kind == "sentinel" else ""
    return SpreadAddress(kind, tls, user, seeds, master, int(db), urlencode(query))


def is_loopback_ip(address: str) -> bool:
    """Whether it is an IP address of the loopback interface."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def is_loopback(url: str) -> bool:
    """Whether only processes of this machine can reach the address, all of its servers."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return True
    return all(host == "localhost" or is_loopback_ip(host) for host in hosts_of(url))


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
    if not uses_tls(url):
        raise BrokerRefusedError(
            f"redis.{_TLS_FILES[next(iter(given))]} is set, but {redacted(url)!r} does not use "
            "TLS: write rediss://HOST:PORT/0"
        )
    query = urlencode(dict(parse_qsl(parts.query)) | given)
    return urlunsplit(parts._replace(query=query))


def check_address(url: str) -> SpreadAddress | None:
    """The address of several servers, if it is one; TLS files are looked at.

    Raises ``BrokerRefusedError`` for an address that is none, with the setting and the remedy.
    """
    where = redacted(url)
    try:
        parts = urlsplit(url)
        spread = parse_spread(url)
        _ = spread or parts.port
    except ValueError as error:
        raise BrokerRefusedError(f"redis.url {where!r} is not a Redis address: {error}") from error
    if spread is None and parts.scheme not in PLAIN_SCHEMES:
        raise BrokerRefusedError(
            f"redis.url {where!r} must begin with redis://, rediss:// or unix://, or with "
            "redis+sentinel:// or redis+cluster://"
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
    return spread


def _seeds(
    parts: SplitResult, kind: str, refused: Callable[[str], BrokerRefusedError]
) -> Iterator[Node]:
    for server in parts.netloc.rpartition("@")[2].split(","):
        one = urlsplit(f"//{server}")
        try:
            port = one.port or _DEFAULT_PORT[kind]
        except ValueError as error:
            raise refused(f"has a bad server {server!r} ({error})") from error
        if not one.hostname:
            raise refused("has an empty place among its servers")
        yield one.hostname, port


def _netloc(node: Node) -> str:
    return f"[{node[0]}]:{node[1]}" if ":" in node[0] else f"{node[0]}:{node[1]}"
