"""TensorBoard files without torch: ``tensorboard``'s own event writer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from ringasync.coordinator.scalars import numbers


class TensorBoardScalars:
    """Every number of a line, one level of nesting included, as ``prefix/name``."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._writer = EventFileWriter(str(directory))

    def add(self, prefix: str, line: dict[str, Any], step: int, at_s: float) -> None:
        """Write the numbers of ``line`` at ``step``."""
        values = [
            summary_pb2.Summary.Value(tag=f"{prefix}/{name}", simple_value=number)
            for name, number in numbers(line)
        ]
        if values:
            summary = summary_pb2.Summary(value=values)
            event = event_pb2.Event(wall_time=at_s, step=step, summary=summary)
            self._writer.add_event(event)

    def flush(self) -> None:
        """Push to the file."""
        self._writer.flush()

    def close(self) -> None:
        """End the file."""
        self._writer.close()
