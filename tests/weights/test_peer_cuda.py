"""Tensors pulled by NCCL between two GPUs; skipped where there are none.

``pytest -s`` shows how fast.
"""

from __future__ import annotations

import subprocess
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ringasync.errors import PeerError
from ringasync.records.weights import WeightManifest
from ringasync.weights import nccl, peer
from ringasync.weights.manifest import load_manifest
from workers.engines.vllm.peer_pull import _ask, pull

from .test_peer import child, publish, said

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = [
    pytest.mark.skipif(GPUS == 0, reason="no CUDA device"),
    pytest.mark.timeout(300),
]
two_gpus = pytest.mark.skipif(GPUS < 2, reason="NCCL refuses two ranks on one GPU")
Child = AbstractContextManager[subprocess.Popen[str]]
ROOT_VERSION = "v000001-f3"
LARGE = 1 << 30
"""Elements of the large tensor: 2 GiB in bfloat16."""


@pytest.fixture
async def manifest(tmp_path: Path) -> WeightManifest:
    """Version 1: one large tensor and many small ones, one of them empty."""
    source = tmp_path / "source"
    source.mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"small.{i}": torch.rand(i % 7, 33, generator=generator).bfloat16() for i in range(200)
    }
    tensors["large"] = torch.randint(0, 99, (LARGE,), generator=generator, dtype=torch.int8).to(
        torch.bfloat16
    )
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text("{}")
    return await publish(tmp_path / "weights", source)


def learner(root: Path, timeout_s: float, how: str = "serves") -> Child:
    return child("learner", root / "weights", ROOT_VERSION, timeout_s, how, "cuda:0")


def assert_exact(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    expected = load_file(tmp_path / "weights" / ROOT_VERSION / "model.safetensors")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name].cpu(), expected[name]) for name in expected)


@two_gpus
def test_nccl_between_two_gpus_is_exact(tmp_path: Path, manifest: WeightManifest) -> None:

    with learner(tmp_path, 120.0) as process:
        offered = load_manifest(said(process))
        for attempt in range(3):
            began_s = time.perf_counter()
            tensors, digests, way = pull(offered, torch.device("cuda:1"))
            took_s = time.perf_counter() - began_s
            size_bytes = sum(tensor.nbytes for tensor in tensors.values())
            print(f"pull {attempt}: {took_s:.3f} s, {size_bytes / took_s / 1e9:.2f} GB/s by {way}")
            assert way == "nccl"
            assert all(tensor.device == torch.device("cuda:1") for tensor in tensors.values())
            assert digests == {one.name: one.digest for one in manifest.tensors}
        assert_exact(tensors, tmp_path)


@pytest.mark.usefixtures("manifest")
def test_one_gpu_for_both_goes_over_the_socket(tmp_path: Path) -> None:

    with learner(tmp_path, 120.0) as process:
        tensors, _, way = pull(load_manifest(said(process)), torch.device("cuda:0"))
    assert way == "socket"
    assert_exact(tensors, tmp_path)


@two_gpus
@pytest.mark.usefixtures("manifest")
@pytest.mark.parametrize(("how", "timeout_s"), [("dies", 120.0), ("stops", 20.0)])
def test_a_learner_that_dies_or_stops_in_a_group_is_left_behind(
    how: str, timeout_s: float, tmp_path: Path
) -> None:

    with learner(tmp_path, timeout_s, how) as process:
        offered = load_manifest(said(process))
        began_s = time.monotonic()
        with pytest.raises(PeerError):
            pull(offered, torch.device("cuda:1"))
        assert time.monotonic() - began_s < 60.0
    torch.cuda.synchronize("cuda:1")  # nothing hangs on the device
    with learner(tmp_path, 120.0) as process:
        assert pull(load_manifest(said(process)), torch.device("cuda:1"))[2] == "nccl"


@two_gpus
@pytest.mark.usefixtures("manifest")
def test_a_worker_that_leaves_its_group_does_not_stop_the_learner(tmp_path: Path) -> None:
    device = torch.device("cuda:1")
    with learner(tmp_path, 120.0) as process:
        offered = load_manifest(said(process))
        assert offered.peer is not None
        connection = peer.Connection.to(offered.peer.port, 120.0)
        with torch.cuda.device(device):
            answer = _ask(connection, offered, offered.peer, device)
            nccl.NcclPair(answer.nccl_id, 1, connection.wait_until).abort()
        connection.close()
        assert pull(offered, device)[2] == "nccl"
