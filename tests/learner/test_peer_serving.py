"""A real learner with ``weights.transport = "nccl"``: what it announces can be pulled from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ringasync.errors import PeerError
from ringasync.records.weights import WeightManifest
from ringasync.weights.manifest import MANIFEST_FILE, load_manifest
from workers.engines.vllm.peer_pull import pull

from ..conftest import RedisServer
from .kit import Feeder, LearnerProcess, write_config

CPU = torch.device("cpu")


async def announced(feeder: Feeder, version: int) -> WeightManifest:
    await feeder.published(version)
    info = await feeder.broker.version(version)
    assert info is not None
    return load_manifest(info.manifest)


async def test_a_learner_serves_what_it_announces_until_it_dies(
    any_redis: RedisServer, tmp_path: Path, model_dir: Path, run_name: str
) -> None:
    path = write_config(tmp_path, run_name, model_dir)
    path.write_text(path.read_text() + 'transport = "nccl"\n')
    feeder = await Feeder.make(any_redis.url, path)
    learner = LearnerProcess.start(path, any_redis.url)
    try:
        first = await announced(feeder, 1)
        assert first.peer is not None
        folder = feeder.config.run_dir / "weights" / f"v000001-f{first.fence}"
        written = (folder / MANIFEST_FILE).read_text()
        assert load_manifest(written).peer is None, "the secret must not lie beside the files"
        assert first.peer.secret not in learner.log()
        tensors, digests, _ = pull(first, CPU)
        expected = load_file(folder / "model.safetensors")
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
        assert digests == {one.name: one.digest for one in first.tensors}
        await feeder.feed(5)
        second = await announced(feeder, 2)
        assert pull(second, CPU)[1] == {one.name: one.digest for one in second.tensors}
        learner.process.kill()
        learner.process.join()
        with pytest.raises(PeerError, match="does not answer"):
            pull(second, CPU)
    finally:
        learner.stop()
        await feeder.close()
