"""The learner's journal: what it took from Redis, durable before Redis forgets it.

An append-only chain of msgpack records (see ``journal_files`` for the bytes). ``append`` returns
after fsync. A torn tail is cut when the journal is opened; other damage is a ``JournalError``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Self

import msgpack

from learner.journal_files import (
    Frame,
    JournalFile,
    decode_frame,
    encode_frame,
    file_name,
    list_files,
    read_frames,
)
from learner.record import BatchRecord, pack_record, unpack_record
from ringasync import SCHEMA_VERSION
from ringasync.durable import room_at, sync_path
from ringasync.errors import MALFORMED, FencedError, JournalError

DEFAULT_FILE_BYTES = 64 << 20
_MAX_REMEMBERED_GROUPS = 100_000
_MARKER_BYTES = 4096
"""A marker frame is far smaller."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one batch is in the journal. ``end`` is what a checkpoint stores."""

    batch_id: str
    step: int
    offset: int
    end: int
    policy_version: int


@dataclass(frozen=True, slots=True)
class _Link:
    """One life of the chain: its files hold the chain from ``base`` to the next life's base."""

    life: int
    base: int


class JournalReader:
    """A journal as it was when it was looked at. Changes nothing, also beside a living learner.

    ``entries`` indexes every batch of the chain, oldest first.
    """

    def __init__(self, directory: Path, chain: _Chain) -> None:
        self._directory = directory
        self._links = chain.links
        self.entries = chain.entries
        self._end = chain.end

    @classmethod
    def look(cls, directory: Path, run: str) -> JournalReader:
        """Check the whole chain; a torn tail, which no learner trained, is left out.

        Raises ``JournalError`` when the chain is damaged before its tail or is another run's.
        """
        return JournalReader(directory, scan(directory, run))

    @property
    def end(self) -> int:
        """Offset one past the last record."""
        return self._end

    def read(self, offset: int = 0) -> Iterator[tuple[Entry, BatchRecord]]:
        """Records that begin at ``offset`` or later, in order."""
        for frame in _frames(self._directory, offset):
            fields = _fields(frame)
            if fields.get("kind") == "batch":
                yield _entry(frame, fields), unpack_record(fields)

    def covers(self, life: int, offset: int) -> bool:
        """Whether ``offset``, as reached by ``life``, lies on the present chain.

        False for what a replaced learner wrote after its successor had begun.
        """
        return offset <= self._end and all(
            link.base >= offset for link in self._links if link.life > life
        )


class Journal(JournalReader):
    """An open journal; only the newest life may append."""

    def __init__(
        self, directory: Path, run: str, life: int, chain: _Chain, file_bytes: int
    ) -> None:
        super().__init__(directory, chain)
        self._run = run
        self.life = life
        self._groups = chain.groups
        self._file_bytes = file_bytes
        self._file: FileIO | None = None
        self._file_base = 0

    @classmethod
    def open(
        cls, directory: Path, run: str, *, fence: int, file_bytes: int = DEFAULT_FILE_BYTES
    ) -> Self:
        """Check the whole chain, cut its torn tail and begin a new life.

        Call it while holding the learner's lock. Raises ``JournalError`` when the chain is damaged
        before its tail, belongs to another run or cannot be written.
        """
        directory.mkdir(parents=True, exist_ok=True)
        chain = scan(directory, run)
        life = max((file.life for file in list_files(directory)), default=0) + 1
        journal = cls(directory, run, life, chain, file_bytes)
        journal._links = [*chain.links, _Link(life, chain.end)]
        journal._begin_file(fence)
        return journal

    def append(self, record: BatchRecord) -> Entry:
        """Write a record and fsync it.

        Raises ``FencedError`` when a newer life has begun (nothing is written), ``JournalError``
        when the disk refuses; what was half written is cut off.
        """
        if max(file.life for file in list_files(self._directory)) > self.life:
            raise FencedError("another learner has opened this run's journal: this one stops")
        if self._end - self._file_base > self._file_bytes:
            self._begin_file(record.fence)
        fields = {"kind": "batch", **pack_record(record)}
        offset = self._write(fields)
        entry = Entry(record.batch_id, record.step, offset, self._end, record.policy_version)
        self.entries.append(entry)
        _remember(self._groups, record.trajectories_per_group)
        return entry

    def holds(self, group_ids: Iterable[str]) -> list[str]:
        """Which of these groups are journalled already, of the last hundred thousand."""
        return [group_id for group_id in group_ids if group_id in self._groups]

    def close(self) -> None:
        """Close the file; everything is on disk already."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begin_file(self, fence: int) -> None:
        self.close()
        path = self._directory / file_name(self.life, self._end)
        try:
            self._file = path.open("xb", buffering=0)
        except FileExistsError as error:
            raise FencedError(f"{path} exists: another learner opened this journal") from error
        except OSError as error:
            raise JournalError(f"cannot create {path}: {error}") from error
        self._file_base = self._end
        self._write({"kind": "marker", "schema": SCHEMA_VERSION, "run": self._run, "fence": fence})
        sync_path(self._directory)

    def _write(self, fields: dict[str, Any]) -> int:
        file = self._file
        if file is None:
            raise JournalError("the journal is closed")
        start = self._end - self._file_base
        data = encode_frame(bytes(msgpack.packb(fields)))
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError as error:
            os.ftruncate(file.fileno(), start)
            file.seek(start)
            raise JournalError(
                f"cannot write the journal in {self._directory}: {error} "
                f"({room_at(self._directory, len(data))}). Free disk space and start the learner "
                "again: nothing is lost, it goes on from here"
            ) from error
        offset = self._end
        self._end += len(data)
        return offset


@dataclass(slots=True)
class _Chain:
    links: list[_Link]
    entries: list[Entry]
    groups: dict[str, None]
    end: int


def scan(directory: Path, run: str) -> _Chain:
    """Walk the whole chain. Raises ``JournalError`` on damage before the tail or another run."""
    chain = _Chain([], [], {}, 0)
    for file, limit in _chain_files(directory):
        if not chain.links or chain.links[-1].life != file.life:
            chain.links.append(_Link(file.life, file.base))
        if file.base != chain.end:
            raise JournalError(
                f"{file.path} begins at {file.base}, expected {chain.end}: {_whole(chain)}"
            )
        for frame in _named_damage(read_frames(file, limit, file.base), chain):
            fields = _fields(frame)
            if fields.get("kind") == "batch":
                chain.entries.append(_entry(frame, fields))
                _remember(chain.groups, _group_ids(frame, fields))
            elif fields.get("run") != run:
                raise JournalError(
                    f"{file.path} belongs to run {fields.get('run')!r}, not to {run!r}"
                )
            chain.end = frame.end
    return chain


def _named_damage(frames: Iterator[Frame], chain: _Chain) -> Iterator[Frame]:
    """The frames; damage among them says which batch was the last whole one."""
    try:
        yield from frames
    except JournalError as error:
        raise JournalError(f"{error}; {_whole(chain)}") from error


def _whole(chain: _Chain) -> str:
    if not chain.entries:
        return "no whole batch comes before"
    last = chain.entries[-1]
    return f"the last whole batch before is {last.batch_id} of step {last.step + 1}"


def _remember(groups: dict[str, None], new: Iterable[str]) -> None:
    """Add group ids, oldest out first: Redis can only lose, and show again, the newest."""
    groups.update(dict.fromkeys(new))
    while len(groups) > _MAX_REMEMBERED_GROUPS:
        del groups[next(iter(groups))]


def _chain_files(directory: Path) -> list[tuple[JournalFile, int | None]]:
    """Files of the chain with the offset at which the next takes over; without those whose first
    frame, the marker, was never completed."""
    files = [file for file in list_files(directory) if _has_marker(file)]
    limits: list[int | None] = [file.base for file in files[1:]]
    return list(zip(files, [*limits, None], strict=True)) if files else []


def _has_marker(file: JournalFile) -> bool:
    with file.path.open("rb") as opened:
        return decode_frame(opened.read(_MARKER_BYTES), 0) is not None


def _frames(directory: Path, offset: int) -> Iterator[Frame]:
    for file, limit in _chain_files(directory):
        if limit is None or limit > offset:
            yield from read_frames(file, limit, max(offset, file.base))


def _fields(frame: Frame) -> dict[str, Any]:
    try:
        fields = msgpack.unpackb(frame.payload, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise JournalError(f"journal record at {frame.offset} is not msgpack: {error}") from error
    if not isinstance(fields, dict) or fields.get("schema") != SCHEMA_VERSION:
        found = fields.get("schema") if isinstance(fields, dict) else type(fields).__name__
        raise JournalError(
            f"journal record at {frame.offset} has schema {found!r}, "
            f"this build reads {SCHEMA_VERSION}"
        )
    return fields


def _entry(frame: Frame, fields: dict[str, Any]) -> Entry:
    try:
        return Entry(
            str(fields["batch_id"]),
            int(fields["step"]),
            frame.offset,
            frame.end,
            int(fields["policy_version"]),
        )
    except MALFORMED as error:
        raise _wrong_field(frame, error) from error


def _group_ids(frame: Frame, fields: dict[str, Any]) -> list[str]:
    try:
        return [str(group[0]) for group in fields["groups"]]
    except MALFORMED as error:
        raise _wrong_field(frame, error) from error


def _wrong_field(frame: Frame, error: Exception) -> JournalError:
    return JournalError(
        f"journal record at {frame.offset} misses a field or has a wrong one: {error!r}"
    )
