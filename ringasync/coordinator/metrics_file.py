"""``metrics.jsonl``: one JSON object a line, every stream entry in it exactly once.

Each life of the coordinator writes a file of its own: it copies the old one without a torn last
line, renames the copy over it and appends to that. A predecessor that was only paused goes on
appending to a file that has no name any more, so it cannot write an entry twice. What it had
appended after the copy was made is still in the stream: trimming carries the fencing token.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

METRICS_FILE = "metrics.jsonl"


class MetricsFile:
    """Append-only writer; ``lines`` of earlier lives are handed out at opening."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO | None = None

    def open(self) -> Iterator[dict[str, Any]]:
        """Take the file over, then yield what it holds. Lines that are not JSON are left out."""
        whole = _whole_lines(self.path)
        staging = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        with staging.open("wb") as copy:
            copy.write(whole)
            copy.flush()
            os.fsync(copy.fileno())
        staging.replace(self.path)
        self._file = self.path.open("ab", buffering=0)
        return _parsed(whole)

    def append(self, lines: Iterable[dict[str, Any]]) -> None:
        """Write lines in one call, so that a crash tears at most the last of them."""
        if self._file is None:
            raise RuntimeError("the metrics file is not open")
        data = b"".join(encode_line(line) for line in lines)
        written = 0
        while written < len(data):  # an unbuffered write may be short
            written += self._file.write(data[written:]) or 0

    def sync(self) -> None:
        """Make it durable: what is trimmed from the stream is nowhere else."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close; appending needs ``open`` again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def encode_line(line: dict[str, Any]) -> bytes:
    """One JSON line; NaN and infinity become null, since they are not JSON."""
    text = json.dumps(_finite(line), separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """All whole lines of a metrics file, also while it is being written."""
    return _parsed(_whole_lines(path))


def _whole_lines(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return b""
    return data[: data.rfind(b"\n") + 1]


def _parsed(data: bytes) -> Iterator[dict[str, Any]]:
    for raw in data.splitlines():
        try:
            line = json.loads(raw)
        except ValueError:
            continue
        if isinstance(line, dict):
            yield line


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
