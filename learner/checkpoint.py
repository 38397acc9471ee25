"""Checkpoints: model, Adam, RNG, journal offset and carried trajectories as one atomic folder.

::

    checkpoints/step00000020-f000003-l000002/
        meta.json        step, journal offset, policy version, data position, checksums
        carry.msgpack    surplus trajectories in full
        tensors/         torch.distributed.checkpoint (also read by sharded engines)

A folder under its final name is complete: it is written under a temporary name, fsynced, renamed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from learner.record import CarriedRollout, pack_carry, unpack_carry
from ringasync import SCHEMA_VERSION
from ringasync.durable import sync_path
from ringasync.errors import CheckpointError, JournalError
from ringasync.runtime import crashpoints

_NAME = re.compile(r"^step(\d{8,})-f(\d{6,})-l(\d{6,})$")
_META, _CARRY, _TENSORS = "meta.json", "carry.msgpack", "tensors"


@dataclass(frozen=True, slots=True)
class CheckpointMeta:
    """What a checkpoint says beside its tensors.

    ``step`` batches are trained; ``journal_offset`` is the end of the last one's record, as reached
    by journal life ``life``. ``data_position`` is ``DataPosition`` JSON. ``last_round_id`` is the
    last round trained (0 when pipelined). ``published_step`` is the step that ``policy_version``
    was published at, -1 if not known: when it is ``step``, the weights are those of that version.
    """

    run: str
    step: int
    fence: int
    life: int
    journal_offset: int
    policy_version: int
    last_round_id: int
    data_position: str
    published_step: int = -1

    @property
    def name(self) -> str:
        """Folder name; contains the fencing token."""
        return f"step{self.step:08d}-f{self.fence:06d}-l{self.life:06d}"


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A loaded checkpoint."""

    meta: CheckpointMeta
    tensors: dict[str, Tensor]
    carry: tuple[CarriedRollout, ...]


def save_checkpoint(
    directory: Path,
    meta: CheckpointMeta,
    tensors: Mapping[str, Tensor],
    carry: tuple[CarriedRollout, ...],
    *,
    keep: int,
) -> Path:
    """Write a checkpoint durably and atomically, then drop all but the newest ``keep``.

    Raises ``CheckpointError`` when it cannot be written; older ones are then untouched.
    """
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / meta.name
    staging = Path(tempfile.mkdtemp(prefix=f".tmp-{meta.name}-", dir=directory))
    try:
        _write_tensors(dict(tensors), staging / _TENSORS)
        carried = pack_carry(carry)
        fields = {
            "schema": SCHEMA_VERSION,
            **asdict(meta),
            "carry_xxh3": xxhash.xxh3_64_hexdigest(carried),
        }
        _write_file(staging / _CARRY, carried)
        _write_file(staging / _META, json.dumps(fields, indent=1).encode())
        sync_path(staging)
        crashpoints.reach("checkpointing", meta.step)
        if target.exists():  # the same life saved this step before: the same content
            shutil.rmtree(target)
        staging.rename(target)
        sync_path(directory)
    except OSError as error:
        raise CheckpointError(
            f"cannot write checkpoint {target}: {error}. Free disk space, then start again"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    _prune(directory, meta, keep)
    return target


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, newest first: by life, then by step."""
    if not directory.is_dir():
        return []
    found = [(match, path) for path in directory.iterdir() if (match := _NAME.match(path.name))]
    found.sort(key=lambda one: (int(one[0][3]), int(one[0][1])), reverse=True)
    return [path for _, path in found]


def load_latest(
    directory: Path,
    run: str,
    *,
    accept: Callable[[CheckpointMeta], bool],
    warn: Callable[[str], None],
    wanted: Callable[[CheckpointMeta], bool] = lambda _meta: True,
) -> Checkpoint | None:
    """The newest checkpoint that is whole and that ``accept`` takes; None when there is none.

    An unusable one is passed over with a warning: an older one leads to the same weights, since
    every later batch is trained again from the journal. Those that are not ``wanted`` are passed
    over in silence. Raises ``CheckpointError`` when checkpoints exist and none of them can be used.
    """
    refused: list[str] = []
    for path in list_checkpoints(directory):
        try:
            meta = read_meta(path)
            if meta.run != run:
                raise CheckpointError(f"it belongs to run {meta.run!r}")
            if not wanted(meta):
                continue
            if not accept(meta):
                warn(f"{path.name} was written by a learner that had been replaced: passed over")
                continue
            return Checkpoint(meta, _read_tensors(path / _TENSORS), _read_carry(path))
        except CheckpointError as error:
            warn(f"checkpoint {path.name} is unusable and passed over: {error}")
            refused.append(f"{path.name}: {error}")
    if refused:
        raise CheckpointError("no checkpoint can be used: " + "; ".join(refused))
    return None


def read_model(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill a model's ``tensors`` (by name, on the CPU) from the checkpoint folder ``path``, in
    place, and read nothing else of it.

    Raises ``CheckpointError`` when the checkpoint is damaged or of another model.
    """
    wanted = {f"model.{name}": tensor for name, tensor in tensors.items()}
    with _readable(path / _TENSORS):
        reader = FileSystemReader(path / _TENSORS)
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


def read_meta(path: Path) -> CheckpointMeta:
    """The meta data of one checkpoint folder. Raises ``CheckpointError`` when it is unreadable."""
    fields = _read_fields(path)
    try:
        # Checkpoints of 0.1 do not say the published step.
        fields = {"published_step": -1, **fields}
        return CheckpointMeta(**{name: fields[name] for name in CheckpointMeta.__slots__})
    except KeyError as error:
        raise CheckpointError(f"{path / _META} misses {error}") from error


def _read_fields(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads((path / _META).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / _META} is unreadable: {error}") from error
    if not isinstance(fields, dict) or fields.get("schema") != SCHEMA_VERSION:
        raise CheckpointError(f"{path / _META} has another schema than {SCHEMA_VERSION}")
    return fields


def _read_carry(path: Path) -> tuple[CarriedRollout, ...]:
    try:
        payload = (path / _CARRY).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path / _CARRY} is unreadable: {error}") from error
    if xxhash.xxh3_64_hexdigest(payload) != _read_fields(path).get("carry_xxh3"):
        raise CheckpointError(f"{path / _CARRY} fails its checksum")
    try:
        return unpack_carry(payload)
    except JournalError as error:
        raise CheckpointError(str(error)) from error


def _write_tensors(tensors: dict[str, Tensor], directory: Path) -> None:
    try:
        with _single_process():
            dcp_save(tensors, storage_writer=FileSystemWriter(directory), no_dist=True)
    except CheckpointException as error:  # derives from BaseException
        raise CheckpointError(f"tensors cannot be written: {error}") from error


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor that the folder holds, on the CPU, whatever engine wrote it."""
    with _readable(directory):
        metadata = FileSystemReader(directory).read_metadata()
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        dcp_load(tensors, storage_reader=FileSystemReader(directory), no_dist=True)
    return tensors


@contextmanager
def _readable(directory: Path) -> Iterator[None]:
    try:
        with _single_process():
            yield
    except CheckpointError:
        raise
    except CheckpointException as error:  # derives from BaseException
        raise CheckpointError(f"{directory}: {error}") from error
    except Exception as error:  # damaged files fail in as many ways as there are readers
        raise CheckpointError(f"{directory}: {error}") from error


@contextmanager
def _single_process() -> Iterator[None]:
    """Silence the reminder that no process group exists: that is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")
        yield


def _write_file(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _prune(directory: Path, written: CheckpointMeta, keep: int) -> None:
    """Drop older checkpoints, and temporary folders that killed learners of lower lives left."""
    for path in list_checkpoints(directory)[keep:]:
        shutil.rmtree(path, ignore_errors=True)
    for path in directory.glob(".tmp-*"):
        match = _NAME.match(path.name.removeprefix(".tmp-").rpartition("-")[0])
        if match is None or int(match[3]) <= written.life:
            shutil.rmtree(path, ignore_errors=True)
