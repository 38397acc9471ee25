"""What must survive a power cut."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def sync_path(path: Path) -> None:
    """Make a file's content, or a folder's renames and new files, durable before returning."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def room_at(path: Path, needed_bytes: int) -> str:
    """For errors of a write at ``path``: what it needs and what is free there, in bytes."""
    there = next(one for one in (path, *path.absolute().parents) if one.exists())
    return f"{needed_bytes} bytes needed, {shutil.disk_usage(there).free} free"


def folder_bytes(folder: Path) -> int:
    """Sizes of the files in ``folder`` itself; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.glob("*") if path.is_file())
