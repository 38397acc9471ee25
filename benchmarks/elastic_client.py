"""One of a herd: at a line on its standard input pulls a version, and keeps it until the next."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from redis.asyncio import Redis

from ringasync.weights.file_transport import FileTransport
from ringasync.weights.manifest import load_manifest
from ringasync.weights.redis_transport import RedisTransport
from ringasync.weights.transport import Transport


async def pull(place: str, run: str, manifest_file: Path, into: Path) -> None:
    """One ``fetch``, its seconds printed; ``place`` is an address, or the file transport's root."""
    transport: Transport
    if place.startswith("redis"):
        redis = Redis.from_url(place)
        await redis.ping()
        transport = RedisTransport(redis, run, own_redis=True)
    else:
        transport = FileTransport(Path(place))
    manifest = load_manifest(await asyncio.to_thread(manifest_file.read_bytes))
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    began_s = time.perf_counter()
    await transport.fetch(manifest, into)
    print(time.perf_counter() - began_s, flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await transport.close()


if __name__ == "__main__":
    place, run, manifest_file, into = sys.argv[1:]
    asyncio.run(pull(place, run, Path(manifest_file), Path(into)))
