"""Swaps whose weights vLLM's worker pulls out of the learner's memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from learner.peer_server import PeerServer
from ringasync.records.weights import WeightManifest
from ringasync.weights.canary import compare_read_back
from ringasync.weights.file_transport import FileTransport
from ringasync.weights.manifest import VersionFields
from tests.vllm.kit import MAX_GAP_NATS, make_engine, reference
from tests.vllm.models import VOCAB_SIZE, write_dense
from workers.engines.base import ScoreRequest
from workers.engines.vllm.engine import VllmEngine

pytestmark = pytest.mark.timeout(420)

PROBE = ScoreRequest((1, 2, 3), tuple((7 * i) % VOCAB_SIZE for i in range(24)))
LEARNER_DEVICE = f"cuda:{torch.cuda.device_count() - 1}" if torch.cuda.is_available() else "cpu"
WAY = "nccl" if torch.cuda.device_count() > 1 else "socket"


async def swap(engine: VllmEngine, folder: Path, manifest: WeightManifest) -> str:
    """One swap as the worker makes it, and exact; returns the way."""
    way = await engine.prepare(folder, manifest)
    await engine.pause()
    await engine.load_weights(folder, manifest.policy_version)
    await engine.resume()
    assert compare_read_back(manifest, await engine.read_back()) == []
    (score,) = await engine.score([PROBE])
    expected = reference(folder, PROBE.prompt_ids, PROBE.token_ids)
    assert np.abs(score - expected).max() < MAX_GAP_NATS
    return way


async def test_a_swap_over_the_peer_path_is_exact_and_one_that_cannot_be_takes_the_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "weights"
    transport = FileTransport(root, keep_versions=9)
    manifests = [
        await transport.publish(
            write_dense(tmp_path / f"w{i}", seed=i, tied=i > 9), VersionFields("demo", i, i, 0, 3)
        )
        for i in (1, 2, 3, 4)
    ]
    folders = [await transport.fetch(manifest, root) for manifest in manifests]
    server = PeerServer(root, LEARNER_DEVICE)
    engine = make_engine()
    await engine.start(folders[0], 1)
    try:
        assert await swap(engine, folders[1], server.offer(manifests[1])) == WAY
        assert engine.last_way == WAY
        assert engine.last_swap_s["stage"] > 0
        stale = server.offer(manifests[2])
        assert await swap(engine, folders[3], server.offer(manifests[3])) == WAY
        assert "not pulled" not in capsys.readouterr().out
        assert await swap(engine, folders[2], stale) == "file"
        said = capsys.readouterr().out
        assert said.count("weights were not pulled but read from files") == 1
        assert "not held here" in said
        server.close()
        gone = manifests[1].model_copy(update={"peer": stale.peer})
        assert await swap(engine, folders[1], gone) == "file"
        assert "does not answer" in capsys.readouterr().out
        assert engine.last_way == "file"
    finally:
        await engine.stop()
        server.close()
        await transport.close()
