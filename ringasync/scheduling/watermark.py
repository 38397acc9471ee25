"""Checkpoint data position: which prompts of the mixture need never be fed again.

Groups close out of order, so the position is a low watermark (every index below it is closed) plus
the closed indices above it. A run that goes on with an empty Redis feeds everything else again:
nothing is skipped, and only what was open is generated twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self

from ringasync.errors import MALFORMED_JSON, CheckpointError

_MAX_EXCEPTIONS = 1 << 22
"""Far above any pool: a run of billions in a damaged file must not fill the memory."""


@dataclass(frozen=True, slots=True)
class DataPosition:
    """Closed prompts: all indices below ``low``, and the ``exceptions``, which lie above it."""

    low: int = 0
    exceptions: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.low < 0 or any(index <= self.low for index in self.exceptions):
            raise ValueError("exceptions must lie above the low watermark, which is 0 or more")

    def close(self, indices: Iterable[int]) -> DataPosition:
        """The position after these prompts have closed as well; closing twice changes nothing."""
        closed = set(self.exceptions)
        for index in indices:
            if index < 0:
                raise ValueError(f"source index {index} is negative")
            if index >= self.low:
                closed.add(index)
        low = self.low
        while low in closed:
            closed.remove(low)
            low += 1
        return DataPosition(low, frozenset(closed))

    def is_closed(self, index: int) -> bool:
        """Whether this prompt need not be fed again."""
        return index < self.low or index in self.exceptions

    def to_feed(self, start: int | None = None) -> Iterator[int]:
        """Indices still to feed, rising without end, from ``start`` (default: the watermark)."""
        index = self.low if start is None else max(start, self.low)
        while True:
            if not self.is_closed(index):
                yield index
            index += 1

    @classmethod
    def before(cls, next_index: int, open_indices: Iterable[int]) -> Self:
        """The position when all below ``next_index`` were fed and ``open_indices`` are open."""
        still_open = {index for index in open_indices if index < next_index}
        low = min(still_open, default=next_index)
        return cls(low, frozenset(i for i in range(low + 1, next_index) if i not in still_open))

    def to_json(self) -> str:
        """Compact JSON: the watermark and the exceptions as ``[first, last]`` runs."""
        runs: list[list[int]] = []
        for index in sorted(self.exceptions):
            if runs and runs[-1][1] == index - 1:
                runs[-1][1] = index
            else:
                runs.append([index, index])
        return json.dumps({"low": self.low, "runs": runs}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what ``to_json`` wrote. Raises ``CheckpointError`` on anything else."""
        try:
            data: Any = json.loads(text)
            low, runs = int(data["low"]), [range(first, last + 1) for first, last in data["runs"]]
            if sum(map(len, runs)) > _MAX_EXCEPTIONS:
                raise ValueError(f"more than {_MAX_EXCEPTIONS} exceptions")
            return cls(low, frozenset(index for run in runs for index in run))
        except MALFORMED_JSON as error:
            raise CheckpointError(f"not a data position: {text[:80]!r} ({error})") from error
