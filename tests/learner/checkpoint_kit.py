"""Saving and restoring in tests: the real files, without a loop around them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from learner.backends.base import Backend
from learner.backends.tensor_files import TensorSaver, read_tensors, write_tensors
from learner.checkpoint import CheckpointMeta, PendingCheckpoint, load_latest
from learner.record import CarriedRollout

from .kit import Feeder


@dataclass(frozen=True, eq=False)
class Loaded:
    """A checkpoint with its tensors."""

    meta: CheckpointMeta
    carry: tuple[CarriedRollout, ...]
    tensors: dict[str, Tensor]


def save_checkpoint(
    directory: Path,
    meta: CheckpointMeta,
    state: Mapping[str, Tensor],
    carry: tuple[CarriedRollout, ...] = (),
    *,
    keep: int = 9,
) -> Path:
    """Write a checkpoint of these tensors from its beginning to its end."""
    saver = TensorSaver()
    pending = PendingCheckpoint.begin(directory, meta, carry, lambda to: saver.begin(state, to))
    try:
        pending.seal()
        return pending.publish(keep=keep)
    finally:
        pending.discard()


def load_checkpoint(
    directory: Path, run: str, accept: object = None
) -> tuple[Loaded | None, list[str]]:
    """The newest checkpoint with its tensors, and the warnings on the way to it."""
    warnings: list[str] = []
    tensors: dict[str, Tensor] = {}
    found = load_latest(
        directory,
        run,
        accept=accept if callable(accept) else lambda _meta: True,
        warn=warnings.append,
        restore=lambda folder: tensors.update(read_tensors(folder)),
    )
    return (None if found is None else Loaded(found.meta, found.carry, tensors)), warnings


def newest_checkpoint(feeder: Feeder) -> Loaded:
    """The run's newest checkpoint."""
    found, warnings = load_checkpoint(feeder.config.run_dir / "checkpoints", feeder.config.run.name)
    assert found is not None, warnings
    return found


def snapshot(backend: Backend) -> dict[str, Tensor]:
    """A copy of the whole state, by way of a folder, as any engine gives it."""
    with tempfile.TemporaryDirectory() as folder:
        backend.begin_save(Path(folder)).result()
        return read_tensors(Path(folder))


def restore(backend: Backend, state: Mapping[str, Tensor]) -> None:
    """Load these tensors into the backend, by way of a folder."""
    with tempfile.TemporaryDirectory() as folder:
        write_tensors(state, Path(folder))
        backend.load(Path(folder))
