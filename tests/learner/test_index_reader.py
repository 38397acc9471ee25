"""A checkpoint's index is a pickle by torch's choice: ours is read, a changed one runs nothing."""

from __future__ import annotations

import os
import pickle
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from learner.backends.tensor_files import read_model, read_tensors, write_tensors
from ringasync.errors import CheckpointError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8)


class Bomb:
    """Pickled, it is a call of ``os.system``."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def test_every_dtype_comes_back(tmp_path: Path) -> None:
    state = {f"model.{i}": torch.ones(3, dtype=dtype) for i, dtype in enumerate(DTYPES)}
    write_tensors(state, tmp_path)
    found = read_tensors(tmp_path)
    assert {name: (one.dtype, one.tolist()) for name, one in found.items()} == {
        name: (one.dtype, one.tolist()) for name, one in state.items()
    }


def test_an_index_that_names_a_function_is_refused_and_nothing_is_called(tmp_path: Path) -> None:
    write_tensors({"model.w": torch.ones(3)}, tmp_path)
    index, trace = tmp_path / ".metadata", tmp_path / "called"
    whole = pickle.loads(index.read_bytes())  # noqa: S301 - our own, written above
    whole.planner_data = Bomb(f"touch {trace}")
    index.write_bytes(pickle.dumps(whole))
    for read in (read_tensors, lambda folder: read_model(folder, {"w": torch.zeros(3)})):
        with pytest.raises(CheckpointError, match=r"posix\.system, which no index does"):
            read(tmp_path)
    assert not trace.exists()
    pickle.loads(index.read_bytes())  # noqa: S301 - torch's own reader would have called it
    assert trace.exists()


def write_with(monkeypatch: pytest.MonkeyPatch, folder: Path, *call: Any) -> None:
    """Write a checkpoint whose index has a call of ``getattr`` for each memory format."""
    with monkeypatch.context() as patch:
        patch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", lambda *_: (getattr, call))
        write_tensors({"model.w": torch.ones(3)}, folder)
    assert b"getattr" in (folder / ".metadata").read_bytes()


def test_an_index_as_python_3_11_0_to_3_11_3_write_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_with(monkeypatch, tmp_path, _MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT")
    assert read_tensors(tmp_path)["model.w"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("call", [(PosixPath, "unlink"), (_MEM_FORMAT_ENCODING, "__class__")])
def test_of_anything_else_no_attribute_is_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: tuple[Any, str]
) -> None:
    write_with(monkeypatch, tmp_path, *call)
    with pytest.raises(CheckpointError, match="as no index does"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps([1]), pickle.dumps(Path("x"))])
def test_an_index_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    write_tensors({"model.w": torch.ones(3)}, tmp_path)
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError):
        read_tensors(tmp_path)
