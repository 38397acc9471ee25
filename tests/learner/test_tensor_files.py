"""Tensor files of several ranks: one process reads in full what two wrote in shards."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from learner.backends.tensor_files import read_model, read_tensors

from .ranks_child import RANKS, full


def test_shards_of_two_ranks_are_one_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "tests.learner.ranks_child"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    for rank in ranks:
        said, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors
        assert said.split() == ["CheckpointError"]  # each rank hears of it
    for name, value in (("first", 0.0), ("second", 100.0)):
        found = read_tensors(tmp_path / name)
        assert found.keys() == {"model.w", "train.updates"}
        assert torch.equal(found["model.w"], full(value))
        assert int(found["train.updates"]) == 3
        assert len(list((tmp_path / name).glob("*.distcp"))) == RANKS
        weights = {"w": torch.zeros_like(full(0.0))}
        read_model(tmp_path / name, weights)
        assert torch.equal(weights["w"], full(value))
