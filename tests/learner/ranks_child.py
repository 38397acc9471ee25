"""One of two ranks that write a checkpoint's tensors together: ``RANK STORE FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from learner.backends.tensor_files import TensorSaver

ROWS, COLUMNS, RANKS = 7, 4, 2


def full(value: float) -> torch.Tensor:
    """float32 [ROWS, COLUMNS]; rows do not divide by the ranks."""
    return torch.arange(ROWS * COLUMNS, dtype=torch.float32).reshape(ROWS, COLUMNS) + value


def main(rank: int, store: str, folder: Path) -> None:
    """Save twice, changing the shards in between; then where nobody can write."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    saver = TensorSaver(group)
    shards = distribute_tensor(full(0.0), mesh, [Shard(0)])
    state = {
        "model.w": shards,
        "train.updates": torch.tensor(3),
    }
    first = saver.begin(state, folder / "first")
    shards.to_local().add_(100.0)  # the next batch is trained
    dist.barrier()  # a collective of the training beside that of the writing
    first.result()
    saver.begin(state, folder / "second").result()
    written = saver.begin(state, folder / "file" / "third").exception()
    print(type(written).__name__, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
