"""TensorBoard files without torch: ``tensorboard``'s own event writer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from ringasync.observability.log import get_logger

log = get_logger(__name__)


class ScalarWriter(Protocol):
    """Takes the numbers of recorded lines."""

    def add(self, prefix: str, line: dict[str, Any], step: int, at_s: float) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class NoScalars:
    """Writes nothing: TensorBoard is switched off or not installed."""

    def add(self, prefix: str, line: dict[str, Any], step: int, at_s: float) -> None:
        """Drop it."""

    def flush(self) -> None:
        """Nothing to flush."""

    def close(self) -> None:
        """Nothing to close."""


class TensorBoardScalars:
    """Every number of a line, one level of nesting included, as ``prefix/name``."""

    def __init__(self, directory: Path) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        directory.mkdir(parents=True, exist_ok=True)
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer = EventFileWriter(str(directory))

    def add(self, prefix: str, line: dict[str, Any], step: int, at_s: float) -> None:
        """Write the numbers of ``line`` at ``step``."""
        values = [
            self._summary.Value(tag=f"{prefix}/{name}", simple_value=number)
            for name, number in numbers(line)
        ]
        if values:
            summary = self._summary(value=values)
            self._writer.add_event(self._event(wall_time=at_s, step=step, summary=summary))

    def flush(self) -> None:
        """Push to the file."""
        self._writer.flush()

    def close(self) -> None:
        """End the file."""
        self._writer.close()


def numbers(line: dict[str, Any]) -> list[tuple[str, float]]:
    """Names and numbers of a line; ``a.b`` for a number in a dictionary, no bool, no id."""
    found: list[tuple[str, float]] = []
    for name, value in line.items():
        if isinstance(value, dict):
            inner = ((f"{name}.{key}", item) for key, item in value.items())
            found += [(key, float(item)) for key, item in inner if _is_number(item)]
        elif _is_number(value) and name not in ("step", "at_ms"):
            found.append((name, float(value)))
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def open_scalars(directory: Path, *, wanted: bool) -> ScalarWriter:
    """A writer for ``directory``, or one that writes nothing."""
    if not wanted:
        return NoScalars()
    try:
        return TensorBoardScalars(directory)
    except ImportError as error:
        log.warning("no TensorBoard files", why=str(error), remedy="pip install tensorboard")
        return NoScalars()
