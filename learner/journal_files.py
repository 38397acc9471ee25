"""Journal files on disk: frames with length and checksum, and the chain of learner lives.

::

    journal/000001-00000000000000000000.journal     life 1, from offset 0
    journal/000002-00000000000000004711.journal     life 2 begins where life 1's valid part ended

Offsets count bytes over the whole chain. Each life of a learner writes files of its own, the first
frame of each being a *marker*. What an earlier life holds beyond a later life's first offset is
void: the torn tail of a crash, and whatever a paused learner appends after it was replaced.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from ringasync.errors import JournalError

_MAGIC = b"ringjnl\x01"
_HEADER_BYTES = len(_MAGIC) + 8 + 8
_NAME = re.compile(r"^(\d{6})-(\d{20})\.journal$")


@dataclass(frozen=True, slots=True)
class Frame:
    """One valid frame: where it begins and ends in the chain, and its payload."""

    offset: int
    end: int
    payload: bytes


@dataclass(frozen=True, slots=True, order=True)
class JournalFile:
    """One file: the life that wrote it and the chain offset of its first byte."""

    life: int
    base: int
    path: Path


def file_name(life: int, base: int) -> str:
    """Name of a journal file."""
    return f"{life:06d}-{base:020d}.journal"


def list_files(directory: Path) -> list[JournalFile]:
    """All journal files of a folder, oldest first."""
    found = []
    for path in directory.iterdir():
        match = _NAME.match(path.name)
        if match:
            found.append(JournalFile(int(match[1]), int(match[2]), path))
    return sorted(found)


def encode_frame(payload: bytes) -> bytes:
    """Magic, length, xxh3_64 over length and payload, payload."""
    length = len(payload).to_bytes(8, "little")
    checksum = xxhash.xxh3_64_digest(length + payload)
    return _MAGIC + length + checksum + payload


def decode_frame(data: bytes, position: int) -> bytes | None:
    """The payload of the frame at ``position``, or None when there is no whole, sane frame."""
    begin = position + _HEADER_BYTES
    header = data[position:begin]
    if len(header) < _HEADER_BYTES or not header.startswith(_MAGIC):
        return None
    length = header[len(_MAGIC) : len(_MAGIC) + 8]
    payload = data[begin : begin + int.from_bytes(length, "little")]
    if len(payload) != int.from_bytes(length, "little"):
        return None
    if xxhash.xxh3_64_digest(length + payload) != header[len(_MAGIC) + 8 :]:
        return None
    return payload


def frame_bytes(payload: bytes) -> int:
    """Size of the frame that holds ``payload``."""
    return _HEADER_BYTES + len(payload)


def read_frames(file: JournalFile, limit: int | None, start: int) -> Iterator[Frame]:
    """Valid frames of one file from chain offset ``start`` on.

    ``limit`` is the chain offset at which the next file takes over; None for the last file, whose
    torn tail ends the iteration. Raises ``JournalError`` when anything else is damaged: a frame
    before ``limit``, or one that is followed by a whole frame.
    """
    data = file.path.read_bytes()
    position = max(0, start - file.base)
    while limit is None or file.base + position < limit:
        payload = decode_frame(data, position)
        if payload is None:
            _check_damage(file, data, position, limit)
            return
        end = position + frame_bytes(payload)
        yield Frame(file.base + position, file.base + end, payload)
        position = end


def _check_damage(file: JournalFile, data: bytes, position: int, limit: int | None) -> None:
    """Return when the damage is the torn tail of the last file, else raise."""
    if limit is not None:
        raise JournalError(
            f"{file.path}: damaged at byte {position}, before its end at {limit - file.base}. "
            "Restore the file from a copy, or remove the run with `ringasync rm` and start again"
        )
    following = data.find(_MAGIC, position + 1)
    while following >= 0:
        if decode_frame(data, following) is not None:
            raise JournalError(
                f"{file.path}: damaged at byte {position}, and a whole record follows at "
                f"{following}: this is not a torn tail. Restore the file from a copy"
            )
        following = data.find(_MAGIC, following + 1)
