"""A worker's folder for weights that it fetched, and the end of those that killed workers left.

SIGKILL leaves the folder behind, with a copy of the model in it under the ``redis`` transport. Each
folder therefore has a lock file beside it, held (flock) as long as its worker lives; the next
worker that starts on this host removes every folder whose lock nobody holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ringasync.observability.log import get_logger

PREFIX = "ringasync-weights-"
_LOCK = ".lock"

log = get_logger()


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder below the host's folder for temporary files, removed at the end.

    Removes what dead workers left there first. Raises ``OSError`` where nothing can be written.
    """
    root = Path(tempfile.gettempdir())
    _sweep(root)
    descriptor, folder = _make(root)
    try:
        yield folder
    finally:
        _remove(folder)
        os.close(descriptor)


def _make(root: Path) -> tuple[int, Path]:
    """A new folder and the descriptor that holds its lock. The lock comes first: a folder without
    one cannot be told from one whose worker has not got so far."""
    while True:
        descriptor, name = tempfile.mkstemp(_LOCK, PREFIX, root)
        if _owns(descriptor, Path(name)):
            folder = Path(name.removesuffix(_LOCK))
            folder.mkdir(mode=0o700)
            return descriptor, folder
        os.close(descriptor)  # a sweep came between its making and its locking


def _owns(descriptor: int, lock: Path) -> bool:
    """Whether this descriptor now holds the lock of the file that has this name."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), lock.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _sweep(root: Path) -> None:
    for lock in root.glob(f"{PREFIX}*{_LOCK}"):
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue  # another user's, or just removed
        try:
            if _owns(descriptor, lock):
                folder = lock.with_name(lock.name.removesuffix(_LOCK))
                log.info("what a dead worker left is removed", folder=str(folder))
                _remove(folder)
        finally:
            os.close(descriptor)


def _remove(folder: Path) -> None:
    """The folder, then its lock, which its holder still has."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_name(folder.name + _LOCK).unlink(missing_ok=True)
