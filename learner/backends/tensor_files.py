"""Full tensors under flat names as a ``torch.distributed.checkpoint`` folder: what every train
engine writes and reads, whatever its ranks and its sharding.

Names: ``model.X``, ``optim.X.{step,exp_avg,exp_avg_sq}``, ``train.updates``, ``rng.*``. Where
ranks hold shards of a tensor (``DTensor``), they write those, and any other ranks read it whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor

from learner.backends.host_memory import HostMemory, own_part
from learner.backends.index_reader import IndexReader
from ringasync.durable import room_at, sync_path
from ringasync.errors import CheckpointError
from ringasync.runtime import crashpoints


class TensorSaver:
    """Copies state to main memory and writes the copy in a thread of its own.

    The copy's memory is kept for the next one (``HostMemory``): as much as the state is large.
    """

    def __init__(self, process_group: ProcessGroup | None = None) -> None:
        """``process_group`` (able to work on CPU tensors) holds the ranks that write together; it
        must be used for nothing else, for the thread's collectives run beside the training's."""
        self._process_group = process_group
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._memory = HostMemory()
        self._writing: Future[None] | None = None

    def begin(self, state: Mapping[str, Tensor], directory: Path) -> Future[None]:
        """Copy ``state``, begin to write the copy under ``directory``, and return.

        Waits for a write that is still under way, since both use the same memory. The future ends
        when everything is fsynced, on all ranks; it raises ``CheckpointError``, as this does when
        main memory does not suffice.
        """
        if self._writing is not None:
            wait([self._writing])
        try:
            staged = self._stage(state)
        except (MemoryError, RuntimeError) as error:
            raise CheckpointError(f"the state cannot be copied to main memory: {error}") from error
        self._writing = self._executor.submit(
            write_tensors, staged, directory, process_group=self._process_group
        )
        return self._writing

    def _stage(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        copies = self._memory.copy(state)
        # As torch's own stager does: from_local would move the memory to the mesh's device.
        return {
            name: DTensor(copies[name], one._spec, requires_grad=False)  # type: ignore[no-untyped-call]
            if isinstance(one, DTensor)
            else copies[name]
            for name, one in state.items()
        }


class _Writer(FileSystemWriter):
    def finish(self, metadata: Metadata, results: Any) -> None:
        crashpoints.reach("checkpoint_half_written")
        super().finish(metadata, results)


def write_tensors(
    tensors: Mapping[str, Tensor], directory: Path, *, process_group: ProcessGroup | None = None
) -> None:
    """Write ``tensors`` under ``directory``, durably. With a group all its ranks must call it.

    Raises ``CheckpointError``; the folder is then of no use.
    """
    try:
        with _without_reminder():
            dcp_save(
                dict(tensors),
                storage_writer=_Writer(directory),
                process_group=process_group,
                no_dist=process_group is None,
            )
        sync_path(directory)
    except (CheckpointException, OSError, RuntimeError) as error:  # the first: a BaseException
        needed = sum(own_part(one).numel() * one.element_size() for one in tensors.values())
        raise CheckpointError(
            f"tensors cannot be written to {directory}: {_reason(error)} "
            f"({room_at(directory, needed)}). Free disk space or make the folder writable"
        ) from error


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of the folder in full, on the CPU. Raises ``CheckpointError``."""
    with _readable(directory):
        metadata = IndexReader(directory).read_metadata()
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        dcp_load(tensors, storage_reader=IndexReader(directory), no_dist=True)
    return tensors


def read_shards(directory: Path, like: Mapping[str, DTensor]) -> dict[str, Tensor]:
    """Every tensor of the folder, of those that are sharded here only this rank's part.

    ``like`` gives parameters by name; their moments lie as they do. A call of one rank: nothing is
    sent. Raises ``CheckpointError``, also where a shape is another one.
    """
    with _readable(directory):
        reader = IndexReader(directory)
        tensors: dict[str, Tensor] = {}
        for name, entry in reader.read_metadata().state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                continue
            kind, _, rest = name.partition(".")
            owner = rest if kind == "model" else rest.rpartition(".")[0]
            part = like.get(owner) if kind in ("model", "optim") else None
            if part is None or not entry.size:
                tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
            elif part.shape != entry.size:
                raise CheckpointError(
                    f"{directory} is of another model: {name} has shape {tuple(entry.size)}, the "
                    f"model {tuple(part.shape)}"
                )
            else:
                tensors[name] = torch.empty_like(part, dtype=entry.properties.dtype)
        dcp_load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def read_model(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill a model's ``tensors`` (by name, on the CPU) from the folder, in place, and read nothing
    else of it.

    Raises ``CheckpointError`` when it is damaged or of another model.
    """
    wanted = {f"model.{name}": tensor for name, tensor in tensors.items()}
    with _readable(directory):
        reader = IndexReader(directory)
        saved = {
            name: tuple(entry.size)
            for name, entry in reader.read_metadata().state_dict_metadata.items()
            if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
        }
        shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
        if saved != shapes:
            odd = sorted(dict(saved.items() ^ shapes.items()))[:3]
            raise CheckpointError(f"it is of another model: tensors {odd} do not match")
        dcp_load(wanted, storage_reader=reader, no_dist=True)


@contextmanager
def _readable(directory: Path) -> Iterator[None]:
    try:
        with _without_reminder():
            yield
    except CheckpointError:
        raise
    except CheckpointException as error:  # derives from BaseException
        raise CheckpointError(f"{directory}: {_reason(error)}") from error
    except Exception as error:  # damaged files fail in as many ways as there are readers
        raise CheckpointError(f"{directory}: {error}") from error


def _reason(error: BaseException) -> str:
    """One line; torch's own text has a traceback for each rank."""
    if not isinstance(error, CheckpointException):
        return str(error)
    return "; ".join(f"rank {rank}: {one}" for rank, (one, _) in error.failures.items())


@contextmanager
def _without_reminder() -> Iterator[None]:
    """Silence the reminder that no process group exists: that is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")
        yield
