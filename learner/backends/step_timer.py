"""Where the time of a batch goes, without waiting for the device in between."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StepTimer:
    """Seconds by part. On CUDA they are the device's, between events in its stream."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is started within it counts for ``name``."""
        if not self._cuda:
            began = time.perf_counter()
            yield
            self._add(name, time.perf_counter() - began)
            return
        first, last = _event(), _event()
        first.record()
        yield
        last.record()
        self._spans.append((name, first, last))

    def seconds(self) -> dict[str, float]:
        """The sums so far; on CUDA it waits until the last part is done."""
        for name, first, last in self._spans:
            last.synchronize()
            self._add(name, first.elapsed_time(last) / 1000)
        self._spans.clear()
        return dict(self._seconds)

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
