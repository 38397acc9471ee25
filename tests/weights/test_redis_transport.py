"""The redis transport against a real server: chunks, limits, pins, lost chunks, a full Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from ringasync.config.schema import Config, DataConfig, RunConfig, TaskConfig, WeightsConfig
from ringasync.errors import (
    BrokerUnreachableError,
    ConfigError,
    ManifestError,
    TransportRefusedError,
)
from ringasync.weights import redis_transport
from ringasync.weights.build import make_transport
from ringasync.weights.file_transport import FileTransport
from ringasync.weights.manifest import VersionFields
from ringasync.weights.redis_keys import WeightKeys
from ringasync.weights.redis_transport import CHUNK_BYTES, RedisTransport

FolderMaker = Callable[..., Path]


def _fields(version: int, fence: int = 3) -> VersionFields:
    return VersionFields("demo", version, version, 0, fence)


KEYS = WeightKeys("demo")


async def test_a_version_arrives_byte_for_byte_in_megabyte_chunks(
    redis: Redis, make_folder: FolderMaker, tmp_path: Path
) -> None:
    source = make_folder("a", extra_bytes=2 * CHUNK_BYTES + 12345)
    learner, worker = RedisTransport(redis, "demo"), RedisTransport(redis, "demo")
    manifest = await learner.publish(source, _fields(7))
    sizes = [await redis.strlen(KEYS.chunk("v000007-f3", "model.safetensors", i)) for i in range(4)]
    assert sizes[:2] == [CHUNK_BYTES, CHUNK_BYTES]
    assert 0 < sizes[2] < CHUNK_BYTES
    assert sizes[3] == 0
    folder = await worker.fetch(manifest, tmp_path / "cache")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in source.iterdir()
    }
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]
    await worker.release(manifest)
    assert not folder.exists()


async def test_a_lost_chunk_is_named_and_leaves_no_folder(
    redis: Redis, make_folder: FolderMaker, tmp_path: Path
) -> None:
    transport = RedisTransport(redis, "demo")
    manifest = await transport.publish(make_folder("a", extra_bytes=CHUNK_BYTES + 1), _fields(1))
    await redis.delete(KEYS.chunk("v000001-f3", "model.safetensors", 1))
    with pytest.raises(ManifestError, match=r"shard model\.safetensors lacks chunk 1"):
        await transport.fetch(manifest, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


async def test_a_cancelled_fetch_leaves_no_folder(
    redis: Redis, make_folder: FolderMaker, tmp_path: Path
) -> None:
    transport = RedisTransport(redis, "demo")
    manifest = await transport.publish(make_folder("a", extra_bytes=3 * CHUNK_BYTES), _fields(1))
    cache = tmp_path / "cache"
    for turns in range(0, 60, 3):
        fetching = asyncio.create_task(transport.fetch(manifest, cache))
        for _ in range(turns):
            await asyncio.sleep(0)
        fetching.cancel()
        with suppress(asyncio.CancelledError):
            await fetching
            await transport.release(manifest)
    assert list(cache.iterdir()) == []


async def test_a_changed_chunk_is_named(
    redis: Redis, make_folder: FolderMaker, tmp_path: Path
) -> None:
    transport = RedisTransport(redis, "demo")
    manifest = await transport.publish(make_folder("a"), _fields(1))
    await redis.setrange(KEYS.chunk("v000001-f3", "config.json", 0), 0, b"[")
    with pytest.raises(ManifestError, match=r"shard config\.json .* checksum"):
        await transport.fetch(manifest, tmp_path)


async def test_discard_and_prune_leave_no_key_behind(
    redis: Redis, make_folder: FolderMaker, tmp_path: Path
) -> None:
    source = make_folder("a")
    transport = RedisTransport(redis, "demo", keep_versions=2)
    manifests = [
        await transport.publish(source, _fields(version), protect={1}) for version in range(1, 5)
    ]
    assert await redis.zrange(KEYS.versions, 0, -1) == [
        b"v000001-f3",
        b"v000003-f3",
        b"v000004-f3",
    ]
    assert await transport.highest_version() == 4
    with pytest.raises(ManifestError, match="lacks chunk 0"):
        await transport.fetch(manifests[1], tmp_path)
    for manifest in manifests:
        assert await transport.discard(manifest)
    assert await redis.keys("*") == []
    assert await transport.highest_version() == 0


async def test_a_version_being_read_is_not_removed_until_the_pin_expires(
    redis: Redis, make_folder: FolderMaker
) -> None:
    transport = RedisTransport(redis, "demo", keep_versions=2)
    source = make_folder("a")
    manifest = await transport.publish(source, _fields(1))
    seconds, _ = await redis.time()
    await redis.zadd(KEYS.pins("v000001-f3"), {"reader": (seconds + 60) * 1000})
    for version in range(2, 5):
        await transport.publish(source, _fields(version))
    assert not await transport.discard(manifest)
    assert await redis.exists(KEYS.index("v000001-f3"))
    await redis.zadd(KEYS.pins("v000001-f3"), {"reader": (seconds - 60) * 1000})
    await transport.publish(source, _fields(5))
    assert not await redis.exists(KEYS.index("v000001-f3"))


async def test_a_large_model_is_refused_on_the_main_redis_only(
    redis: Redis, make_folder: FolderMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert redis_transport.MAIN_REDIS_LIMIT_BYTES == 64 << 20
    source = make_folder("a")
    with (source / "large.safetensors").open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(TransportRefusedError, match=r"weights\.redis_url") as refusal:
        await RedisTransport(redis, "demo").publish(source, _fields(1))
    assert "weights.transport = 'file'" in str(refusal.value)
    assert await redis.keys("*") == []
    monkeypatch.setattr(redis_transport, "MAIN_REDIS_LIMIT_BYTES", 10)
    (source / "large.safetensors").unlink()
    second = RedisTransport(redis, "demo", own_redis=True)
    assert (await second.publish(source, _fields(1))).transport == "redis"


async def test_a_full_redis_refuses_with_the_remedy_and_keeps_nothing(
    redis: Redis, make_folder: FolderMaker
) -> None:
    used = int((await redis.info("memory"))["used_memory"])
    await redis.config_set("maxmemory", used + 3 * CHUNK_BYTES)
    source = make_folder("a", extra_bytes=8 * CHUNK_BYTES)
    with pytest.raises(TransportRefusedError, match=r"Redis is full .* weights\.redis_url"):
        await RedisTransport(redis, "demo").publish(source, _fields(1))
    assert await redis.keys("*") == []


async def test_publishing_again_repeats_the_answer_or_refuses(
    redis: Redis, make_folder: FolderMaker, tmp_path: Path
) -> None:
    transport, source = RedisTransport(redis, "demo"), make_folder("a")
    first = await transport.publish(source, _fields(1))
    await redis.delete(KEYS.chunk("v000001-f3", "config.json", 0))
    assert await transport.publish(source, _fields(1)) == first
    await transport.fetch(first, tmp_path / "c")
    with pytest.raises(ManifestError, match="never reused"):
        await transport.publish(make_folder("b", seed=1), _fields(1))


async def test_discard_all_and_consume(redis: Redis, make_folder: FolderMaker) -> None:
    transport, source = RedisTransport(redis, "demo"), make_folder("a")
    await redis.set("ring:{other}:w", "stays")
    await transport.publish(source, _fields(1), consume=True)
    assert not source.exists()
    await transport.discard_all()
    assert await redis.keys("*") == [b"ring:{other}:w"]


async def test_an_absent_redis_is_named(make_folder: FolderMaker, tmp_path: Path) -> None:
    absent = Redis(unix_socket_path=str(tmp_path / "none.sock"), retry=Retry(NoBackoff(), 0))
    with pytest.raises(BrokerUnreachableError, match="Redis for weights"):
        await RedisTransport(absent, "demo").publish(make_folder("a"), _fields(1))
    await absent.aclose()


@dataclass
class _Broker:
    client: Redis


def _config(tmp_path: Path, **weights: Any) -> Config:
    return Config(
        run=RunConfig(name="demo", dir=tmp_path),
        data=DataConfig(tasks=(TaskConfig(name="t", kind="jsonl"),)),
        weights=WeightsConfig(**weights),
    )


async def test_make_transport_follows_the_configuration(
    redis: Redis,
    redis_socket: str,
    make_folder: FolderMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broker = _Broker(redis)
    transport = make_transport(_config(tmp_path), broker)
    assert isinstance(transport, FileTransport)
    await transport.publish(make_folder("a"), _fields(1))
    assert (tmp_path / "demo" / "weights" / "v000001-f3").is_dir()

    main = make_transport(_config(tmp_path, transport="redis"), broker)
    assert isinstance(main, RedisTransport)

    url = f"unix://{redis_socket}"
    second = make_transport(_config(tmp_path, transport="redis", redis_url=url), broker)
    monkeypatch.setattr(redis_transport, "MAIN_REDIS_LIMIT_BYTES", 10)
    await second.publish(make_folder("b"), _fields(1))
    assert await main.highest_version() == 1
    await second.close()

    with pytest.raises(ConfigError, match=r"weights\.redis_url"):
        make_transport(_config(tmp_path, transport="redis", redis_url="host:1"), broker)
