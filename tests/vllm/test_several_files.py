"""Exports of several files with an index: what transformers, vLLM and the worker's swap load."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from learner.backends import export
from learner.backends.torch_backend import TorchBackend, TorchSettings
from learner.checkpoint import CheckpointMeta
from learner.export import export_checkpoint
from ringasync.config.schema import LossConfig
from ringasync.weights.canary import compare_read_back
from ringasync.weights.file_transport import FileTransport
from ringasync.weights.manifest import VersionFields
from tests.learner.backend_contract import learner_config
from tests.learner.checkpoint_kit import save_checkpoint
from tests.learner.kit import toy_batch
from tests.vllm.kit import MAX_GAP_NATS, make_engine, reference
from tests.vllm.models import VOCAB_SIZE, write_dense
from workers.engines.base import ScoreRequest

pytestmark = pytest.mark.timeout(300)

SHARD_BYTES = 40_000
PROBE = ScoreRequest((1, 2, 3), tuple((7 * i) % VOCAB_SIZE for i in range(24)))


def files_of(folder: Path) -> list[str]:
    """Files of weights, all of them in the index, each name in it once."""
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == names
    return names


@pytest.mark.parametrize("tied", [True, False])
async def test_several_files_are_loaded_by_transformers_vllm_and_a_swap(
    tmp_path: Path, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_dense(tmp_path / "start", seed=3, tied=tied)
    settings = TorchSettings(learner_config(lr=0.02), LossConfig(), dtype=torch.float32)
    backend = TorchBackend.from_pretrained(str(source), settings)
    exports = [tmp_path / f"export{i}" for i in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(export, "SHARD_BYTES", SHARD_BYTES)
        backend.save_hf(exports[0])
    backend.train_batch(toy_batch())
    meta = CheckpointMeta("small", 1, 1, 1, 0, 2, 0, "{}", 0)
    checkpoint = save_checkpoint(tmp_path / "checkpoints", meta, backend.state_dict())
    exports[1].mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(export, "SHARD_BYTES", SHARD_BYTES)
        export_checkpoint(checkpoint, str(source), "float32", exports[1])
    backend.save_hf(tmp_path / "one-file")
    singles = [source, tmp_path / "one-file"]
    expected = [reference(one, PROBE.prompt_ids, PROBE.token_ids) for one in singles]
    assert np.abs(expected[0] - expected[1]).max() > 100 * MAX_GAP_NATS  # it learned

    root = tmp_path / "weights"
    transport = FileTransport(root, keep_versions=9)
    folders, manifests = [], []
    for i, folder in enumerate(exports):
        assert len(files_of(folder)) > 3
        assert (singles[i] / "model.safetensors").is_file()
        found = reference(folder, PROBE.prompt_ids, PROBE.token_ids)  # by transformers
        assert np.array_equal(found, expected[i])
        manifests.append(await transport.publish(folder, VersionFields("small", i + 1, i, 0, 3)))
        folders.append(await transport.fetch(manifests[i], root))
        assert len(files_of(folders[i])) > 3

    engine = make_engine()
    await engine.start(folders[0], 1)  # vLLM's own loader, as `vllm serve` uses it
    try:
        (score,) = await engine.score([PROBE])
        assert np.abs(score - expected[0]).max() < MAX_GAP_NATS
        assert compare_read_back(manifests[0], await engine.read_back()) == []
        for i in (1, 0):  # the worker's staging, there and back
            assert await engine.prepare(folders[i], manifests[i]) == "file"
            await engine.pause()
            await engine.load_weights(folders[i], i + 1)
            await engine.resume()
            assert compare_read_back(manifests[i], await engine.read_back()) == []
            (score,) = await engine.score([PROBE])
            assert np.abs(score - expected[i]).max() < MAX_GAP_NATS
    finally:
        await engine.stop()
        await transport.close()
