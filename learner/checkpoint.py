"""Checkpoints: model, Adam, RNG, journal offset and carried trajectories as one atomic folder.

::

    checkpoints/step00000020-f000003-l000002/
        meta.json        step, journal offset, policy version, data position, checksums
        carry.msgpack    surplus trajectories in full
        tensors/         the backend's state (``learner.backends.tensor_files``), any ranks

A folder under its final name is complete: it is written under a temporary name, fsynced, renamed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from learner.record import CarriedRollout, pack_carry, unpack_carry
from ringasync import SCHEMA_VERSION
from ringasync.durable import room_at, sync_path
from ringasync.errors import CheckpointError, JournalError
from ringasync.runtime import crashpoints

_NAME = re.compile(r"^step(\d{8,})-f(\d{6,})-l(\d{6,})$")
_META, _CARRY, _TENSORS = "meta.json", "carry.msgpack", "tensors"
_READ_BYTES = 1 << 24
_META_BYTES = 1 << 12
"""Meta data with its checksums, about."""


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
    """A checkpoint that was found whole and restored."""

    meta: CheckpointMeta
    carry: tuple[CarriedRollout, ...]


@dataclass(frozen=True, slots=True, eq=False)
class PendingCheckpoint:
    """A checkpoint under a temporary name, whose tensors are being written.

    ``tensors`` ends when they are durable, or raises ``CheckpointError``. Then ``seal`` and
    ``publish`` make it a checkpoint; ``discard`` ends it at any point.
    """

    meta: CheckpointMeta
    carry: tuple[CarriedRollout, ...]
    staging: Path
    tensors: Future[None]

    @classmethod
    def begin(
        cls,
        directory: Path,
        meta: CheckpointMeta,
        carry: tuple[CarriedRollout, ...],
        begin_save: Callable[[Path], Future[None]],
    ) -> PendingCheckpoint:
        """Have ``begin_save`` (a backend's) copy the state; returns when that is done.

        Raises ``CheckpointError``; nothing is left of it then.
        """
        try:
            directory.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=f".tmp-{meta.name}-", dir=directory))
        except OSError as error:
            raise _cannot_write(directory / meta.name, error, 0) from error
        try:
            return cls(meta, carry, staging, begin_save(tensors_in(staging)))
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise

    @property
    def target(self) -> Path:
        """Its final name."""
        return self.staging.with_name(self.meta.name)

    def seal(self) -> None:
        """Wait for the tensors, write the rest and all checksums. Raises ``CheckpointError``."""
        self.tensors.result()
        carried = pack_carry(self.carry)
        try:
            fields = {
                "schema": SCHEMA_VERSION,
                **asdict(self.meta),
                "carry_xxh3": xxhash.xxh3_64_hexdigest(carried),
                "tensors_xxh3": _digests(tensors_in(self.staging)),
            }
            _write_file(self.staging / _CARRY, carried)
            _write_file(self.staging / _META, json.dumps(fields, indent=1).encode())
            sync_path(self.staging)
        except OSError as error:
            raise _cannot_write(self.target, error, len(carried) + _META_BYTES) from error

    def publish(self, *, keep: int) -> Path:
        """Give a sealed checkpoint its name, then drop all but the newest ``keep``.

        Raises ``CheckpointError``; older ones are then untouched.
        """
        crashpoints.reach("checkpointing", self.meta.step)
        try:
            if self.target.exists():  # the same life saved this step before: the same content
                shutil.rmtree(self.target)
            self.staging.rename(self.target)
            sync_path(self.target.parent)
        except OSError as error:
            raise _cannot_write(self.target, error, 0) from error
        _prune(self.target.parent, self.meta, keep)
        return self.target

    def discard(self) -> None:
        """Remove what is not published; waits for the writing to end."""
        self.tensors.exception()
        shutil.rmtree(self.staging, ignore_errors=True)


def tensors_in(path: Path) -> Path:
    """The folder of a checkpoint's tensors."""
    return path / _TENSORS


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
    restore: Callable[[Path], None],
    wanted: Callable[[CheckpointMeta], bool] = lambda _meta: True,
) -> Checkpoint | None:
    """Restore the newest checkpoint that is whole and that ``accept`` takes; None without any.

    ``restore`` (a backend's ``load``) gets the folder of its tensors; when it raises
    ``CheckpointError`` it has changed nothing. An unusable checkpoint is passed over with a
    warning: an older one leads to the same weights, since every later batch is trained again from
    the journal. Those that are not ``wanted`` are passed over in silence.

    Raises ``CheckpointError`` when checkpoints exist and none of them can be used.
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
            carry = _read_carry(path)
            verify_tensors(path)
            restore(tensors_in(path))
        except CheckpointError as error:
            warn(f"checkpoint {path.name} is unusable and passed over: {error}")
            refused.append(f"{path.name}: {error}")
        else:
            return Checkpoint(meta, carry)
    if refused:
        raise CheckpointError("no checkpoint can be used: " + "; ".join(refused))
    return None


def verify_tensors(path: Path) -> None:
    """Compare a checkpoint's tensor files with their checksums. Raises ``CheckpointError``.

    torch does not: a flipped bit would become a weight. Checkpoints of 0.1 have no checksums.
    """
    expected = _read_fields(path).get("tensors_xxh3")
    if expected is None:
        return
    try:
        found = _digests(tensors_in(path))
    except OSError as error:
        raise CheckpointError(f"{tensors_in(path)} is unreadable: {error}") from error
    if found != expected:
        odd = sorted(dict(found.items() ^ expected.items()))
        raise CheckpointError(f"{tensors_in(path)}: missing, damaged or foreign files: {odd[:3]}")


def read_meta(path: Path) -> CheckpointMeta:
    """The meta data of one checkpoint folder. Raises ``CheckpointError`` when it is unreadable."""
    fields = _read_fields(path)
    try:
        # Checkpoints of 0.1 do not say the published step.
        fields = {"published_step": -1, **fields}
        meta = CheckpointMeta(**{name: fields[name] for name in CheckpointMeta.__slots__})
    except KeyError as error:
        raise CheckpointError(f"{path / _META} misses {error}") from error
    for name in CheckpointMeta.__slots__:
        value, is_text = getattr(meta, name), name in ("run", "data_position")
        if type(value) is not (str if is_text else int) or (not is_text and int(value) < -1):
            raise CheckpointError(f"{path / _META}: {name} is {value!r}")
    return meta


def _read_fields(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads((path / _META).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
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


def _digests(directory: Path) -> dict[str, str]:
    """xxh3 of each file by name."""
    digests = {}
    for path in sorted(directory.iterdir()):
        digest = xxhash.xxh3_64()
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
        digests[path.name] = digest.hexdigest()
    return digests


def _cannot_write(target: Path, error: OSError, needed_bytes: int) -> CheckpointError:
    return CheckpointError(
        f"cannot write checkpoint {target}: {error} ({room_at(target, needed_bytes)}). "
        "Free disk space or make the folder writable"
    )


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
