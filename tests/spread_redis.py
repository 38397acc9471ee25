"""Real Redis processes that share a run's keeping: a primary with Sentinels, a cluster."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redis import Redis
from redis.crc import key_slot
from redis.exceptions import RedisError

from ringasync.broker.keys import Keys
from tests.tls_kit import Authority

DEADLINE_S = 40.0
HOST = "127.0.0.1"
SLOTS = 16384


def wait_for(condition: Callable[[], Any], what: str) -> None:
    """Poll until it is true; a Redis that does not answer yet is not true."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            if condition():
                return
        except (RedisError, OSError, KeyError):
            pass
        assert time.monotonic() < deadline, f"{what} did not happen in {DEADLINE_S:g} s"
        time.sleep(0.05)


def low_port() -> int:
    """A free port whose cluster bus, 10000 higher, is free as well."""
    for port in range(20_000 + time.monotonic_ns() % 9000, 31_000):
        with socket.socket() as own, socket.socket() as bus:
            try:
                own.bind((HOST, port))
                bus.bind((HOST, port + 10_000))
            except OSError:
                continue
            return port
    raise AssertionError("no free port")


@dataclass
class Server:
    """One process that can be killed and started again, with its data, at its port."""

    binary: Path
    folder: Path
    arguments: tuple[str, ...]
    login: dict[str, Any] = field(default_factory=dict)
    port_option: str = "--port"
    port: int = field(default_factory=low_port)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.folder.mkdir(exist_ok=True, parents=True)
        own = [*self.arguments, self.port_option, str(self.port), "--dir", str(self.folder)]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen([str(self.binary), *own], stdout=log, stderr=log)
        wait_for(self.is_up, f"redis at {self.port}")

    def is_up(self) -> bool:
        return bool(self.ask("PING"))

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def ask(self, *command: Any) -> Any:
        with Redis(HOST, self.port, socket_timeout=5, **self.login) as client:
            return client.execute_command(*command)


CLUSTER = ("--cluster-enabled", "yes", "--cluster-node-timeout", "3000")
DATA = ("--save", "", "--appendonly", "yes", "--bind", HOST)


@dataclass
class SentinelGroup:
    """A primary, its replica and three Sentinels that agree by two."""

    servers: list[Server]
    sentinels: list[Server]

    @property
    def url(self) -> str:
        hosts = ",".join(f"{HOST}:{each.port}" for each in self.sentinels)
        return f"redis+sentinel://{hosts}/mymaster?db=0"

    def primary(self) -> Server | None:
        """The only server that says it is one; None in the middle of a failover."""
        found = [each for each in self.servers if _role(each) == "master"]
        return found[0] if len(found) == 1 else None

    def cut_replication(self) -> None:
        """From here on the replica gets nothing: a failover loses what follows."""
        primary = self.servers[0]
        primary.ask("ACL", "SETUSER", "default", "-psync", "-sync", "-replconf")
        primary.ask("CLIENT", "KILL", "TYPE", "replica")
        wait_for(lambda: not primary.ask("INFO", "replication")["connected_slaves"], "the cut")


def _role(server: Server) -> str:
    try:
        return str(server.ask("INFO", "replication")["role"])
    except (RedisError, OSError):
        return "down"


@contextmanager
def sentinel_group(
    binary: Path, folder: Path, *arguments: str, tls: Authority | None = None
) -> Iterator[SentinelGroup]:
    """``arguments`` go to the Sentinels. ``tls``: all of them speak nothing else, and want a
    certificate of whoever calls."""
    encrypted: tuple[str, ...] = ()
    login: dict[str, Any] = {}
    if tls is not None:
        (cert, key), (own_cert, own_key) = tls.server_files(HOST), tls.client_files()
        encrypted = ("--port", "0", "--tls-replication", "yes", "--tls-auth-clients", "yes")
        encrypted += ("--tls-cert-file", str(cert), "--tls-key-file", str(key))
        encrypted += ("--tls-ca-cert-file", str(tls.ca_file))
        login = {"ssl": True, "ssl_ca_certs": str(tls.ca_file)}
        login |= {"ssl_certfile": str(own_cert), "ssl_keyfile": str(own_key)}
    with ExitStack() as stack:

        def run(name: str, *given: str) -> Server:
            option = "--tls-port" if tls else "--port"
            server = Server(binary, folder / name, (*given, *encrypted), login, option)
            stack.callback(server.kill)
            return server

        first = run("first", *DATA)
        first.start()
        second = run("second", *DATA, "--replicaof", HOST, str(first.port))
        second.start()
        wait_for(lambda: second.ask("INFO", "replication")["master_link_status"] == "up", "sync")
        group = SentinelGroup([first, second], [])
        for number in range(3):
            file = folder / f"sentinel-{number}.conf"
            file.write_text(
                f"sentinel monitor mymaster {HOST} {first.port} 2\n"
                "sentinel down-after-milliseconds mymaster 1500\n"
                "sentinel failover-timeout mymaster 6000\n"
            )
            sentinel = run(file.stem, str(file), "--sentinel", "--bind", HOST, *arguments)
            group.sentinels.append(sentinel)
            sentinel.start()
        for sentinel in group.sentinels:
            wait_for(lambda s=sentinel: _knows_all(s), "Sentinels knowing each other")  # type: ignore[misc]
        yield group


def _knows_all(sentinel: Server) -> bool:
    with Redis(HOST, sentinel.port, socket_timeout=5, **sentinel.login) as client:
        state = client.sentinel_masters()["mymaster"]
    return bool(state["num-other-sentinels"] == 2 and state["num-slaves"] == 1)


@dataclass
class Cluster:
    """Three nodes, each with a third of the slots."""

    nodes: list[Server]

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"{HOST}:{each.port}" for each in self.nodes[:2])

    def owner(self, run: str) -> Server:
        """The node that has the run's slot."""
        slot = key_slot(Keys(run).prefix.encode())
        for node in self.nodes:
            for first, last, primary, *_ in self._slots(node):
                if first <= slot <= last:
                    return next(each for each in self.nodes if each.port == primary[1])
        raise AssertionError(f"nobody has slot {slot}")

    def _slots(self, node: Server) -> list[Any]:
        try:
            return list(node.ask("CLUSTER", "SLOTS"))
        except (RedisError, OSError):
            return []

    def migrate(self, run: str, keys_at_once: int = 50) -> Server:
        """Move the run's slot to another node while it is in use; returns the new owner."""
        source = self.owner(run)
        target = next(node for node in self.nodes if node is not source)
        slot = key_slot(Keys(run).prefix.encode())
        ids = {node.port: _text(node.ask("CLUSTER", "MYID")) for node in self.nodes}
        target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source.port])
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target.port])
        login = ["AUTH2", "default", target.login["password"]] if target.login else []
        while keys := source.ask("CLUSTER", "GETKEYSINSLOT", slot, keys_at_once):
            where = ("MIGRATE", HOST, target.port, "", 0, 5000)
            source.ask(*where, *login, "KEYS", *keys)
        for node in (target, source, *self.nodes):
            node.ask("CLUSTER", "SETSLOT", slot, "NODE", ids[target.port])
        return target


@contextmanager
def redis_cluster(
    binary: Path, folder: Path, *arguments: str, login: dict[str, str] | None = None
) -> Iterator[Cluster]:
    """``arguments`` go to every node, ``login`` is that of its administrator."""
    with ExitStack() as stack:
        nodes = []
        for number in range(3):
            own = (*DATA, *CLUSTER, *arguments)
            node = Server(binary, folder / f"node-{number}", own, login or {})
            stack.callback(node.kill)
            nodes.append(node)
            node.start()
            share = range(SLOTS * number // 3, SLOTS * (number + 1) // 3)
            node.ask("CLUSTER", "ADDSLOTS", *share)
            node.ask("CLUSTER", "MEET", HOST, nodes[0].port)
        for node in nodes:
            wait_for(lambda n=node: is_whole(n, 3), "a whole cluster")  # type: ignore[misc]
        yield Cluster(nodes)


def is_whole(node: Server, nodes: int) -> bool:
    """Whether this node knows as many and finds all slots served."""
    lines = dict(line.split(":") for line in _text(node.ask("CLUSTER", "INFO")).split())
    return lines["cluster_state"] == "ok" and lines["cluster_known_nodes"] == str(nodes)


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
