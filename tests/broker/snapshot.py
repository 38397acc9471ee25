"""Saving every key of a run and putting it back: what Redis looks like after it lost its tail."""

from __future__ import annotations

from ringasync.broker.client import Broker


async def snapshot(broker: Broker) -> dict[bytes, bytes]:
    """All keys of the run, dumped."""
    dumped: dict[bytes, bytes] = {}
    async for key in broker.client.scan_iter(match=broker.keys.prefix + "*", count=1000):
        value = await broker.client.dump(key)
        if value is not None and key != broker.keys.sim_now.encode():
            dumped[key] = value
    return dumped


async def restore(broker: Broker, dumped: dict[bytes, bytes]) -> None:
    """Put the snapshot back at once, the simulated time apart, which no rollback turns back."""
    keys = [
        key
        async for key in broker.client.scan_iter(match=broker.keys.prefix + "*", count=1000)
        if key != broker.keys.sim_now.encode()
    ]
    async with broker.client.pipeline(transaction=True) as pipe:
        pipe.delete(*keys)
        for key, value in dumped.items():
            pipe.restore(key, 0, value, replace=True)  # a role may have made it meanwhile
        await pipe.execute()
