"""The policy's folder, written in place or from a copy beside the next batch.

::

    begin, on every rank: own shards -> main memory, in the dtype of publication
    in a thread of each:  shards, parameter by parameter -> rank 0 -> files of 1 GiB
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from learner.backends.export import HfFolder, export_hf, exported_tensors, published_dtype
from learner.backends.host_memory import HostMemory
from learner.backends.ranks import Ranks
from learner.backends.zero_params import is_zero_shard
from ringasync.errors import EnvironmentRefusedError


class WeightExporter:
    """Writes a model of this process, or of all ranks, as ``export_hf`` does.

    The copy that ``begin`` makes takes ``dtype`` of this rank's shards in main memory, and its
    memory is kept for the next one. No rank ever holds the whole of a sharded model.
    """

    def __init__(
        self, dtype: torch.dtype, source: str, ranks: Ranks, group: ProcessGroup | None
    ) -> None:
        """``group`` (able to work on CPU tensors) holds the ranks that have shards; it must be used
        for nothing else, for the threads' messages run beside the training's."""
        self._dtype, self._source = dtype, source
        self._ranks, self._group = ranks, group
        self._memory = HostMemory()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="export")
        self._writing: Future[None] | None = None

    def save(self, model: Any, directory: Path) -> None:
        """See ``Backend.save_hf``."""
        is_first = self._ranks.rank == 0
        export_hf(model, directory, dtype=self._dtype, source=self._source, write=is_first)

    def begin(self, model: Any, directory: Path) -> Future[None]:
        """See ``Backend.begin_export``."""
        if self._writing is not None:
            wait([self._writing])  # both use the same memory
        state = exported_tensors(model)
        if any(map(is_zero_shard, state.values())):  # gathered by DeepSpeed alone
            self.save(model, directory)
            return _done()
        is_first = self._ranks.rank == 0
        mine = {name: one for name, one in state.items() if is_first or isinstance(one, DTensor)}
        dtypes = {name: published_dtype(one, self._dtype) for name, one in mine.items()}
        problem: EnvironmentRefusedError | None = None
        copies: dict[str, Tensor] = {}
        try:
            copies = self._memory.copy(mine, dtypes)
        except (MemoryError, RuntimeError) as error:
            problem = EnvironmentRefusedError(
                f"the weights cannot be copied to main memory: {error}. Set "
                "learner.publish_async = false, which makes no copy, and start again: nothing is "
                "lost"
            )
        self._ranks.agree(problem)
        rows = {name: one.shape[0] for name, one in mine.items() if isinstance(one, DTensor)}
        folder: HfFolder | None = None
        if is_first:
            folder = HfFolder(model, state, directory, dtype=self._dtype, source=self._source)
        self._writing = self._executor.submit(self._write, copies, rows, folder)
        return self._writing

    def _write(
        self, copies: Mapping[str, Tensor], rows: Mapping[str, int], folder: HfFolder | None
    ) -> None:
        """``rows``: of the whole of what is sharded, by rows, in equal parts but for the last."""
        for name, own in copies.items():
            value = own if name not in rows else self._gather(own, rows[name])
            if folder is not None:
                folder.add(name, value)
        if folder is not None:
            folder.finish()

    def _gather(self, own: Tensor, rows: int) -> Tensor:
        """The whole on rank 0; what is returned elsewhere is of no use."""
        part = -(-rows // self._ranks.size)
        if self._ranks.rank:
            if own.numel():
                dist.send(_as_bytes(own), 0, self._group)
            return own
        found = torch.empty((rows, *own.shape[1:]), dtype=own.dtype)
        found[: own.shape[0]] = own
        for rank in range(1, self._ranks.size):
            theirs = found[rank * part : (rank + 1) * part]
            if theirs.numel():
                dist.recv(_as_bytes(theirs), rank, self._group)
        return found


def _as_bytes(tensor: Tensor) -> Tensor:
    """The same memory; gloo need not know its dtype."""
    return tensor.view(-1).view(torch.uint8)


def _done() -> Future[None]:
    done: Future[None] = Future()
    done.set_result(None)
    return done
