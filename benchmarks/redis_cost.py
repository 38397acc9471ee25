"""What a Redis server says of its own cost, read from INFO before and after."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

_SETTLE_TIMEOUT_S = 10.0
_COUNT_S = 0.25


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Counters of one server. ``cpu_s`` is user and system time of all its threads."""

    cpu_s: float
    main_thread_cpu_s: float
    memory_bytes: int
    aof_bytes: int
    script_s: float
    """Time inside EVALSHA, without reading the command and writing the reply."""

    def __sub__(self, before: Snapshot) -> Snapshot:
        return Snapshot(
            self.cpu_s - before.cpu_s,
            self.main_thread_cpu_s - before.main_thread_cpu_s,
            self.memory_bytes - before.memory_bytes,
            self.aof_bytes - before.aof_bytes,
            self.script_s - before.script_s,
        )


async def prepare(client: Redis) -> str:
    """Keep the log from being rewritten in the middle of a measurement; the server's version."""
    await client.config_set("auto-aof-rewrite-percentage", 0)
    return str((await client.info("server"))["redis_version"])


async def snapshot(client: Redis) -> Snapshot:
    """Read the counters once everything accepted has been written to the log file.

    Client connections own buffers that count as memory, so keep their number equal on both sides.
    Raises ``TimeoutError`` when the log does not settle.
    """
    persistence = await _settled(client)
    cpu = await client.info("cpu")
    memory = await _counted(client)
    commands: dict[str, Any] = await client.info("commandstats")
    return Snapshot(
        cpu_s=float(cpu["used_cpu_user"]) + float(cpu["used_cpu_sys"]),
        main_thread_cpu_s=float(cpu["used_cpu_user_main_thread"])
        + float(cpu["used_cpu_sys_main_thread"]),
        memory_bytes=int(memory["used_memory"])
        - int(memory.get("mem_clients_normal", 0))
        - int(memory.get("mem_aof_buffer", 0)),
        aof_bytes=int(persistence["aof_current_size"]),
        script_s=float(commands.get("cmdstat_evalsha", {}).get("usec", 0)) / 1e6,
    )


async def _counted(client: Redis) -> dict[str, Any]:
    """Memory, once the buffers of clients are counted as they are: the server does that beside its
    work, ten times a second. As it is at the time limit, if it never stands still."""
    deadline = time.monotonic() + _SETTLE_TIMEOUT_S
    before = -1
    while True:
        memory: dict[str, Any] = await client.info("memory")
        rest = int(memory["used_memory"]) - int(memory.get("mem_clients_normal", 0))
        if rest == before or time.monotonic() > deadline:
            return memory
        before = rest
        await asyncio.sleep(_COUNT_S)


async def _settled(client: Redis) -> dict[str, Any]:
    deadline = time.monotonic() + _SETTLE_TIMEOUT_S
    while True:
        persistence: dict[str, Any] = await client.info("persistence")
        if not int(persistence["aof_buffer_length"]):
            return persistence
        if time.monotonic() > deadline:
            raise TimeoutError("redis does not get its append-only file written")
        await asyncio.sleep(0.02)
