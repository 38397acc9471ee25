"""A real Redis loses up to two seconds: its append-only file is cut, or a lagging replica leads."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ringasync.broker.client import Broker
from ringasync.broker.embedded import EmbeddedRedis
from ringasync.broker.types import GradeJob, Lease, TrainedTokens, VersionInfo
from tests.conftest import RedisServer
from tests.redis_process import DEADLINE_S, redis_process
from tests.workers.world import until

from .kit import TTL_MS, Kit

WINDOW_S = 2.0
TURNS = 24
GROUP_TOKENS, GROUP_ROLLOUTS = 8, 2


@dataclass
class History:
    """What was given out and acknowledged before the loss: none of it may come again."""

    lease_tokens: set[str] = field(default_factory=set)
    fences: list[int] = field(default_factory=list)
    journal: dict[str, list[str]] = field(default_factory=dict)
    """Batch -> groups, as the learner's disk has them."""
    accepted: int = 0
    held: list[tuple[Lease, int]] = field(default_factory=list)
    """Leases that their worker still generates for, with what it appended."""


async def work(kit: Kit, seen: History, first: int, turns: int) -> None:
    """Turns of all roles: groups come to ready, batches are taken and trained, others stay open."""
    for turn in range(first, first + turns):
        ready = f"g{turn}"
        session = await kit.session(f"s{turn}")
        await kit.feed(f"o{turn}", ready)
        leases = await kit.broker.take(session, 4, 1)
        seen.lease_tokens |= {lease.token for lease in leases}
        for lease in leases:
            assert await kit.append(lease, 0, 4) == "ok"
            if lease.group_id == ready:
                assert await kit.finish(lease, 4, session) == "ok"
        jobs = await kit.broker.take_grading(session, 2)
        seen.lease_tokens |= {job.token for job in jobs}
        await kit.grade(jobs, [float(job.rollout_id.endswith(".1")) for job in jobs], session)
        seen.held += [(lease, 4) for lease in leases if lease.group_id != ready]
        if turn % 2:
            await train(kit, seen, f"b{turn}", [f"g{turn - 1}", ready], turn)
        if turn % 5 == 4:  # the learner is replaced
            await kit.broker.release_lock(kit.learner)
            kit.learner = await kit.broker.acquire_lock("learner", f"l{turn}", TTL_MS)
            seen.fences.append(kit.learner.token)
        seen.accepted = (await kit.broker.ledger())["accepted"]


async def train(kit: Kit, seen: History, batch: str, groups: list[str], turn: int) -> None:
    """A batch is journalled and committed; every second one is trained as well."""
    raw, stale = await kit.broker.reserve(kit.learner, batch, groups, 0, None)
    assert ([group.group_id for group in raw], stale) == (groups, [])
    seen.journal[batch] = groups
    await kit.broker.commit(kit.learner, batch, dict.fromkeys(groups, GROUP_ROLLOUTS))
    if turn % 4 == 1:
        items = [TrainedTokens(group, GROUP_TOKENS, 0, 0) for group in groups]
        await kit.broker.mark_trained(kit.learner, batch, items, turn)


async def settle(kit: Kit, seen: History) -> int:
    """What coordinator and learner do when they find another server, with all that must hold.

    Returns how many accepted tokens had vanished.
    """
    back = (await kit.broker.ledger())["accepted"]
    before = (await kit.broker.run_meta())["incarnation"]
    # A learner that comes between the loss and the new incarnation, and one that comes after it.
    for life in ("early", "late"):
        await kit.broker.client.delete(kit.broker.keys.lock("learner"))  # its holder died
        kit.learner = await kit.broker.acquire_lock("learner", life, TTL_MS)
        assert kit.learner.token > max(seen.fences)
        seen.fences.append(kit.learner.token)
        if life == "early":
            unnoticed = await kit.broker.take(await kit.session("early"), 99, 1)
            assert not {lease.token for lease in unnoticed} & seen.lease_tokens
            seen.lease_tokens |= {lease.token for lease in unnoticed}
            number = await kit.broker.check_incarnation(kit.coordinator)
            assert number is not None
            assert number > int(before)
    accounts = await kit.check()
    assert accounts.get("lost", 0) == seen.accepted - back
    assert sum(accounts.values()) == seen.accepted
    for lease, length in seen.held:
        assert await kit.append(lease, length, 1) in ("fenced", "gone")
    for batch, groups in seen.journal.items():
        await kit.broker.force_taken(
            kit.learner, batch, {group: (GROUP_TOKENS, GROUP_ROLLOUTS) for group in groups}
        )
        for group in groups:
            assert await kit.group_state(group) in ("taken", "trained")
    accounts = await kit.check()
    assert sum(accounts.values()) == seen.accepted
    taken = accounts.get("taken", 0) + accounts.get("trained", 0)
    assert taken == GROUP_TOKENS * sum(len(groups) for groups in seen.journal.values())
    session = await kit.session("after")
    again = await kit.broker.take(session, 99, 1)
    jobs = await kit.broker.take_grading(session, 99)
    given: list[Lease | GradeJob] = [*again, *jobs]
    assert not {one.token for one in given} & seen.lease_tokens
    journalled = {group for groups in seen.journal.values() for group in groups}
    assert not {one.group_id for one in given} & journalled
    left = await kit.broker.ready_groups(99)
    assert not {group.group_id for group in left} & journalled  # nothing is trained twice
    await kit.broker.publish(kit.learner, VersionInfo(2, 1, 0, "{}"))
    await kit.check()
    return seen.accepted - back


def record_ends(data: bytes) -> list[int]:
    """Offsets behind each command of an append-only file."""
    ends, at = [], 0
    while at < len(data):
        line = data.index(b"\r\n", at)
        count, at = int(data[at + 1 : line]), line + 2
        for _ in range(count):
            line = data.index(b"\r\n", at)
            at = line + 2 + int(data[at + 1 : line]) + 2
        ends.append(at)
    return ends


@pytest.mark.parametrize("where", ["boundary", "middle"])
@pytest.mark.parametrize("seed", range(4))
async def test_an_append_only_file_cut_up_to_two_seconds_back(
    redis_server: RedisServer, tmp_path: Path, seed: int, where: str
) -> None:
    server = EmbeddedRedis(tmp_path / "redis", 1 << 28, binary=redis_server.binary)
    broker = await Broker.connect(await server.start(), "demo")
    aof = server.folder / "appendonly.aof"
    try:
        await broker.create_run("", "h")
        kit, seen = await Kit.make(broker), History()
        seen.fences.append(kit.learner.token)
        sizes: list[tuple[float, int]] = []
        for turn in range(TURNS):
            sizes.append((time.monotonic(), aof.stat().st_size))
            await work(kit, seen, turn, 1)
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        await until(server.has_ended, "the server's end")
        data = aof.read_bytes()
        oldest = next(size for at, size in sizes if at >= sizes[-1][0] - WINDOW_S)
        chance = random.Random(f"{seed} {where}")
        ends = [end for end in record_ends(data) if oldest < end < len(data)]
        cut = chance.choice(ends)
        if where == "middle":  # the last command is torn, as by a power cut
            cut -= chance.randint(1, 8)
        aof.write_bytes(data[:cut])
        again = EmbeddedRedis(server.folder, 1 << 28, binary=redis_server.binary)
        assert await again.start() == server.url
        try:
            await settle(kit, seen)
        finally:
            await again.stop()
    finally:
        await broker.close()
        await server.stop()


class Switch:
    """A port that leads to whichever port is the present target, as a name that fails over does."""

    def __init__(self) -> None:
        self.target = 0
        self._writers: list[asyncio.StreamWriter] = []
        self._pumps: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until either side ends it."""
        self._writers.append(writer)
        there, back = await asyncio.open_connection("127.0.0.1", self.target)
        self._writers.append(back)
        for source, sink in ((reader, back), (there, writer)):
            self._pumps.add(asyncio.create_task(self._pump(source, sink)))

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(1 << 16):
                sink.write(data)
                await sink.drain()
        sink.close()

    async def close(self) -> None:
        """End every connection."""
        for writer in self._writers:
            writer.close()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        waits = [writer.wait_closed() for writer in self._writers]
        await asyncio.gather(*waits, return_exceptions=True)


@asynccontextmanager
async def switch() -> AsyncIterator[tuple[int, Switch]]:
    """The port of a switch, and the switch."""
    leads = Switch()
    server = await asyncio.start_server(leads.serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], leads
    finally:
        server.close()
        await leads.close()
        await server.wait_closed()


def ask(port: int, *words: str) -> bytes:
    """One command to the server at a port, without a client; its raw answer."""
    with socket.create_connection(("127.0.0.1", port), DEADLINE_S) as connection:
        connection.sendall(b" ".join(word.encode() for word in words) + b"\r\n")
        return connection.recv(1 << 16)


def pid_at(port: int) -> int:
    fields = dict(line.split(":", 1) for line in ask(port, "INFO", "server").decode().split("\r\n")
                  if ":" in line)  # fmt: skip
    return int(fields["process_id"])


@pytest.mark.parametrize("seed", range(2))
async def test_a_lagging_replica_takes_over(
    redis_server: RedisServer, tmp_path: Path, seed: int
) -> None:
    folders = [tmp_path / name for name in ("primary", "replica")]
    for folder in folders:
        folder.mkdir()
    binary = redis_server.binary
    lag = random.Random(seed).randint(1, TURNS // 2)
    async with switch() as (port, leads):
        with (
            redis_process(binary, folders[0], "--maxmemory-policy", "noeviction") as primary,
            redis_process(
                *(binary, folders[1], "--maxmemory-policy", "noeviction"),
                *("--replicaof", "127.0.0.1", str(primary)),
            ) as replica,
        ):
            leads.target = primary
            broker = await Broker.connect(f"redis://127.0.0.1:{port}/0", "demo")
            await broker.create_run("", "h")
            kit, seen = await Kit.make(broker), History()
            seen.fences.append(kit.learner.token)
            await work(kit, seen, 0, TURNS - lag)
            deadline_s = time.monotonic() + DEADLINE_S
            while not ask(primary, "WAIT", "1", "500").startswith(b":1"):
                assert time.monotonic() < deadline_s, "the replica does not follow"
            primary_pid, replica_pid = pid_at(primary), pid_at(replica)
            os.kill(replica_pid, signal.SIGSTOP)
            try:  # what is written from here on never reaches the replica
                ask(primary, "CLIENT", "KILL", "TYPE", "replica")
                await work(kit, seen, TURNS - lag, lag)
                os.kill(primary_pid, signal.SIGKILL)
            finally:
                os.kill(replica_pid, signal.SIGCONT)
            assert ask(replica, "REPLICAOF", "NO", "ONE").startswith(b"+OK")
            leads.target = replica
            assert await settle(kit, seen) == lag * 4 * 4  # four rollouts a turn, four tokens each
            await broker.close()
