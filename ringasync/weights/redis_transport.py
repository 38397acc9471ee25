"""Weights through Redis in 1 MB chunks: for pods without a shared path, and small models.

Put it on a second Redis without an append-only file (``weights.redis_url``). On the run's own Redis
it is refused above 64 MB: bulk values delay the appends of rollouts. Chunks are 1 MB because
16 MB ones raise the 99th percentile of an append from 0.3 to 55 ms. The keys of a version::

    ring:{run}:w                     sorted set of version names, by policy version
    ring:{run}:w:VERSION             hash: shard -> number of chunks (all of them, written first)
    ring:{run}:w:VERSION:SHARD:i     chunk i of a shard
    ring:{run}:w:VERSION:pins        sorted set of readers, by expiry in ms of Redis's clock
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import xxhash
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError
from redis.exceptions import TimeoutError as RedisTimeoutError

from ringasync.errors import BrokerUnreachableError, ManifestError, TransportRefusedError
from ringasync.records.weights import ShardInfo, WeightManifest
from ringasync.weights.manifest import (
    VersionFields,
    build_manifest,
    check_shard_name,
    published_files,
    version_name,
)
from ringasync.weights.redis_keys import WeightKeys

CHUNK_BYTES = 1 << 20
MAIN_REDIS_LIMIT_BYTES = 64 << 20
_PIN_MS = 60_000
_CHUNKS_PER_PIN = 32
"""A reader renews its pin after this many chunks."""

_REMEDY = (
    "set weights.redis_url to a second Redis without an append-only file, "
    "or weights.transport = 'file' with a path that all roles share"
)


class RedisTransport:
    """``Transport`` over Redis. ``own_redis`` tells that ``redis`` is not the run's broker.

    Delivery: a version is whole in Redis before ``publish`` returns; a chunk that is lost later is
    a ``ManifestError`` at ``fetch``, never a short file.
    """

    def __init__(
        self, redis: Redis, run: str, *, keep_versions: int = 3, own_redis: bool = False
    ) -> None:
        self._redis: Any = redis
        self._keys = WeightKeys(run)
        self._keep_versions = keep_versions
        self._own_redis = own_redis
        self._reader = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._copies: dict[str, list[Path]] = {}

    async def publish(
        self,
        source_dir: Path,
        fields: VersionFields,
        *,
        consume: bool = False,
        protect: Collection[int] = (),
    ) -> WeightManifest:
        """See ``Transport.publish``. A full Redis refuses with the remedy; nothing is left."""
        name = version_name(fields.policy_version, fields.fence)
        self._check_size(await asyncio.to_thread(_total_bytes, source_dir))
        manifest = await asyncio.to_thread(build_manifest, source_dir, fields, "redis", name)
        chunks = {shard.name: _num_chunks(shard) for shard in manifest.shards}
        try:
            await self._begin(name, fields, manifest, chunks)
            for shard in manifest.shards:
                await self._send(name, source_dir / shard.name)
            await self._prune(set(protect))
        except OutOfMemoryError as error:
            await self._remove(name)
            raise TransportRefusedError(
                f"Redis is full while version {fields.policy_version} is published: {_REMEDY}"
            ) from error
        except (RedisConnectionError, RedisTimeoutError) as error:
            raise _unreachable(error) from error
        if consume:
            await asyncio.to_thread(shutil.rmtree, source_dir, True)
        return manifest

    async def fetch(self, manifest: WeightManifest, into: Path, *, contents: bool = True) -> Path:
        """See ``Transport.fetch``: a copy in a fresh folder below ``into``, renamed when whole.

        It is checked while it is copied, ``contents`` or not.
        """
        del contents
        name = _name_of(manifest)
        await asyncio.to_thread(into.mkdir, parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp("", f".tmp-{name}-", into))
        folder = into / staging.name.removeprefix(".tmp-")
        try:
            for shard in manifest.shards:
                await self._receive(manifest, shard, staging)
            await asyncio.to_thread(staging.rename, folder)
            await self._redis.zrem(self._keys.pins(name), self._reader)
        except (RedisConnectionError, RedisTimeoutError) as error:
            raise _unreachable(error) from error
        except ManifestError:
            await self._redis.zrem(self._keys.pins(name), self._reader)
            raise
        except asyncio.CancelledError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        self._copies.setdefault(name, []).append(folder)
        return folder

    async def release(self, manifest: WeightManifest) -> None:
        """See ``Transport.release``: removes the copy."""
        copies = self._copies.get(_name_of(manifest))
        if copies:
            await asyncio.to_thread(shutil.rmtree, copies.pop(), True)

    async def discard(self, manifest: WeightManifest) -> bool:
        """See ``Transport.discard``."""
        name = _name_of(manifest)
        if await self._is_read(name):
            return False
        await self._remove(name)
        return True

    async def discard_all(self) -> None:
        """See ``Transport.discard_all``."""
        for name in await self._redis.zrange(self._keys.versions, 0, -1):
            await self._remove(_text(name))

    async def highest_version(self) -> int:
        """See ``Transport.highest_version``; versions whose sending broke off count."""
        newest = await self._redis.zrange(self._keys.versions, -1, -1, withscores=True)
        return int(newest[0][1]) if newest else 0

    async def close(self) -> None:
        """See ``Transport.close``. The broker's connection is left open."""
        for copies in self._copies.values():
            while copies:
                await asyncio.to_thread(shutil.rmtree, copies.pop(), True)
        if self._own_redis:
            await self._redis.aclose()

    def _check_size(self, size_bytes: int) -> None:
        if not self._own_redis and size_bytes > MAIN_REDIS_LIMIT_BYTES:
            raise TransportRefusedError(
                f"the model has {size_bytes / 1e6:.0f} MB, above the "
                f"{MAIN_REDIS_LIMIT_BYTES >> 20} MB that the run's own Redis may carry: {_REMEDY}"
            )

    async def _begin(
        self, name: str, fields: VersionFields, manifest: WeightManifest, chunks: dict[str, int]
    ) -> None:
        """Write down what will be sent: a killed learner's half must be found and removed."""
        index, digest = self._keys.index(name), _shards_digest(manifest)
        before = await self._redis.hget(index, "")
        if before is not None and _text(before) != digest:
            raise ManifestError(
                f"version {fields.policy_version} is in Redis already with other bytes: "
                "policy versions are never reused"
            )
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.zadd(self._keys.versions, {name: fields.policy_version})
            pipe.hset(index, mapping={"": digest, **chunks})
            await pipe.execute()

    async def _send(self, name: str, path: Path) -> None:
        index = 0
        while chunk := _read_chunk(path, index):
            await self._redis.set(self._keys.chunk(name, path.name, index), chunk)
            index += 1

    async def _receive(self, manifest: WeightManifest, shard: ShardInfo, staging: Path) -> None:
        check_shard_name(shard.name)
        name, label = _name_of(manifest), f"version {manifest.policy_version}: shard {shard.name}"
        hasher = xxhash.xxh3_128()
        size_bytes = 0
        _append(staging / shard.name, b"")
        for index in range(_num_chunks(shard)):
            if index % _CHUNKS_PER_PIN == 0:
                await self._pin(name)
            chunk = await self._redis.get(self._keys.chunk(name, shard.name, index))
            if chunk is None:
                raise ManifestError(f"{label} lacks chunk {index} in Redis (removed since?)")
            hasher.update(chunk)
            size_bytes += len(chunk)
            _append(staging / shard.name, chunk)
        if size_bytes != shard.size_bytes or hasher.hexdigest() != shard.xxh3_128:
            raise ManifestError(
                f"{label} has {size_bytes} bytes and checksum {hasher.hexdigest()}, "
                f"the manifest says {shard.size_bytes} and {shard.xxh3_128}"
            )

    async def _now_ms(self) -> int:
        seconds, micros = await self._redis.time()
        return int(seconds) * 1000 + int(micros) // 1000

    async def _pin(self, name: str) -> None:
        pins, expiry_ms = self._keys.pins(name), await self._now_ms() + _PIN_MS
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.zadd(pins, {self._reader: expiry_ms})
            pipe.pexpire(pins, _PIN_MS)
            await pipe.execute()

    async def _is_read(self, name: str) -> bool:
        pins = self._keys.pins(name)
        return bool(await self._redis.zcount(pins, await self._now_ms(), "+inf"))

    async def _prune(self, protect: set[int]) -> None:
        newest_last = await self._redis.zrange(self._keys.versions, 0, -1, withscores=True)
        for raw, version in newest_last[: -self._keep_versions]:
            if int(version) not in protect and not await self._is_read(_text(raw)):
                await self._remove(_text(raw))

    async def _remove(self, name: str) -> None:
        """Delete a version's keys; the entry in the list of versions goes last."""
        index = self._keys.index(name)
        for shard, count in (await self._redis.hgetall(index)).items():
            if not shard:
                continue
            keys = [self._keys.chunk(name, _text(shard), i) for i in range(int(count))]
            if keys:
                await self._redis.unlink(*keys)
        await self._redis.unlink(index, self._keys.pins(name))
        await self._redis.zrem(self._keys.versions, name)


def _name_of(manifest: WeightManifest) -> str:
    return version_name(manifest.policy_version, manifest.fence)


def _num_chunks(shard: ShardInfo) -> int:
    return -(-shard.size_bytes // CHUNK_BYTES)


def _read_chunk(path: Path, index: int) -> bytes:
    """A megabyte takes below a millisecond: not worth a thread that outlives a cancellation."""
    with path.open("rb") as file:
        file.seek(index * CHUNK_BYTES)
        return file.read(CHUNK_BYTES)


def _append(path: Path, chunk: bytes) -> None:
    with path.open("ab") as file:
        file.write(chunk)


def _total_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in published_files(folder))


def _shards_digest(manifest: WeightManifest) -> str:
    joined = "".join(f"{shard.name}:{shard.xxh3_128};" for shard in manifest.shards)
    return xxhash.xxh3_128(joined.encode()).hexdigest()


def _text(raw: bytes | str) -> str:
    return raw.decode() if isinstance(raw, bytes) else raw


def _unreachable(error: BaseException) -> BrokerUnreachableError:
    return BrokerUnreachableError(f"Redis for weights does not answer: {error}")
