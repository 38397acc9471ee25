"""The two things the broker benchmark compares, each on a Redis of its own.

An arm gives out *writers*: one writer is one simulated client, one call of it is one request that
stores one segment of each of ``per_call`` rollouts and raises unless all of them were stored.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from redis.asyncio import Redis

from benchmarks.redis_cost import prepare
from ringasync.broker.client import Broker
from ringasync.broker.embedded import EmbeddedRedis
from ringasync.broker.types import AppendItem, Fence, Lease, NewGroup
from ringasync.records.segment import encode_segment, policy_segment

GROUP_SIZE = 8
_GROUPS_A_CALL = 128
_LEASES_A_CALL = 256
_PROMPT_TOKENS = 64
_POLICY_VERSION = 3
_HOUR_MS = 3_600_000  # nothing may expire under a measurement
_MAXMEMORY_BYTES = 4 << 30
_CLIENTS_A_POOL = 50
"""Simulated clients that share one connection pool, each with a connection while it waits for an
answer; redis-py allows 100 in a pool."""


class Writer(Protocol):
    """One simulated client."""

    async def __call__(self) -> None:
        """Store the next segment of each rollout of the next batch."""
        ...


class Arm(Protocol):
    """One way to store segments."""

    name: str

    async def start(self) -> str:
        """Start the server; returns its version."""
        ...

    async def writers(self, clients: int, per_call: int, batches: int) -> Sequence[Writer]:
        """New clients, each with ``per_call * batches`` fresh rollouts that it goes round."""
        ...

    @property
    def client(self) -> Redis:
        """For reading the server's counters."""
        ...

    async def stop(self) -> None:
        """Stop the server; safe to call when it never started."""
        ...


def example_payload(tokens: int, vocab_size: int) -> bytes:
    """An encoded segment of random tokens, from the middle of a rollout."""
    random = np.random.default_rng(0)
    ids = random.integers(0, vocab_size, tokens)
    ids[0] = vocab_size - 1  # the largest id decides how wide ids are stored
    logprobs = -random.exponential(1.0, tokens)
    return encode_segment(policy_segment(512, _POLICY_VERSION, ids.tolist(), logprobs.tolist()))


class _Server:
    """A Redis of its own and the pools of connections to it."""

    def __init__(self, folder: Path) -> None:
        self._server = EmbeddedRedis(folder, _MAXMEMORY_BYTES)
        self._pools: list[Broker] = []

    async def start(self) -> str:
        """See ``Arm.start``."""
        await self._server.start()
        await self._add_pool()
        return await prepare(self.client)

    async def _add_pool(self) -> None:
        self._pools.append(await Broker.connect(self._server.url, "bench"))

    async def pools_for(self, clients: int) -> list[Broker]:
        """For each client the pool it uses."""
        while len(self._pools) * _CLIENTS_A_POOL < clients:
            await self._add_pool()
        return [self._pools[i // _CLIENTS_A_POOL] for i in range(clients)]

    @property
    def broker(self) -> Broker:
        """The first pool; only after ``start``."""
        return self._pools[0]

    @property
    def client(self) -> Redis:
        """See ``Arm.client``."""
        return self.broker.client

    async def stop(self) -> None:
        """See ``Arm.stop``."""
        for pool in self._pools:
            await pool.close()
        await self._server.stop()


class BrokerArm(_Server):
    """``append_many`` of the real client on leased rollouts."""

    name = "append_many"

    def __init__(self, folder: Path, payload: bytes, tokens: int) -> None:
        super().__init__(folder)
        self._payload, self._tokens = payload, tokens
        self._numbers = itertools.count()
        self._fence: Fence | None = None

    async def start(self) -> str:
        """See ``Arm.start``."""
        version = await super().start()
        await self.broker.create_run("", "bench")
        self._fence = await self.broker.acquire_lock("coordinator", "bench", _HOUR_MS)
        return version

    async def writers(self, clients: int, per_call: int, batches: int) -> Sequence[Writer]:
        """See ``Arm.writers``: feeds the rollouts, opens a session a client and takes leases."""
        held = per_call * batches
        await self._feed(-(-clients * held // GROUP_SIZE))
        found: list[Writer] = []
        for broker in await self.pools_for(clients):
            session = f"client-{next(self._numbers)}"
            await broker.open_session(session, "worker", _HOUR_MS, {})
            leases: list[Lease] = []
            while len(leases) < held:
                wanted = min(_LEASES_A_CALL, held - len(leases))
                leases += await broker.take(session, wanted, _POLICY_VERSION)
            groups = [leases[i : i + per_call] for i in range(0, held, per_call)]
            found.append(_BrokerWriter(broker, session, groups, self._payload, self._tokens))
        return found

    async def _feed(self, count: int) -> None:
        assert self._fence is not None
        groups = [_group(f"g{next(self._numbers):06d}") for _ in range(count)]
        for i in range(0, count, _GROUPS_A_CALL):
            some = groups[i : i + _GROUPS_A_CALL]
            fed = await self.broker.feed(self._fence, f"feed-{next(self._numbers)}", some, "")
            assert fed == len(some)


def _group(group_id: str) -> NewGroup:
    return NewGroup(
        group_id=group_id,
        kind="train",
        domain="bench",
        prompt="What is the sum of the numbers that follow? " * 5,
        prompt_ids=tuple(range(1000, 1000 + _PROMPT_TOKENS)),
        task={"answer": "42"},
        source_index=0,
        size=GROUP_SIZE,
        max_new_tokens=65536,
    )


class _BrokerWriter:
    def __init__(
        self,
        broker: Broker,
        session: str,
        batches: Sequence[Sequence[Lease]],
        payload: bytes,
        tokens: int,
    ) -> None:
        self._broker, self._session, self._batches = broker, session, batches
        self._payload, self._tokens = payload, tokens
        self._calls = 0

    async def __call__(self) -> None:
        segment, batch = divmod(self._calls, len(self._batches))
        self._calls += 1
        start = segment * self._tokens
        items = [
            AppendItem(
                lease.rollout_id,
                lease.token,
                start,
                self._tokens,
                self._tokens,
                _POLICY_VERSION,
                self._payload,
            )
            for lease in self._batches[batch]
        ]
        statuses = await self._broker.append_many(self._session, items)
        assert statuses == ["ok"] * len(items), statuses


class XaddArm(_Server):
    """A bare ``XADD`` of the same bytes to one stream, as many in a pipeline."""

    name = "XADD"

    def __init__(self, folder: Path, payload: bytes) -> None:
        super().__init__(folder)
        self._payload = payload

    async def writers(self, clients: int, per_call: int, batches: int) -> Sequence[Writer]:
        """See ``Arm.writers``; a stream knows no rollouts, so ``batches`` changes nothing."""
        del batches
        pools = await self.pools_for(clients)
        return [_XaddWriter(pool.client, per_call, self._payload) for pool in pools]


class _XaddWriter:
    def __init__(self, client: Redis, per_call: int, payload: bytes) -> None:
        self._client, self._per_call, self._payload = client, per_call, payload

    async def __call__(self) -> None:
        async with self._client.pipeline(transaction=False) as pipeline:
            for _ in range(self._per_call):
                pipeline.xadd("segments", {"d": self._payload})
            ids = await pipeline.execute()
        assert len(ids) == self._per_call
