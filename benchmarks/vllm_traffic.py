"""A constant number of rollouts in an engine, and when each of them got tokens.

The engine is behind the worker's own ``EngineControl``, so calls and tokens go the worker's way.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks.vllm_models import Load
from ringasync.errors import EngineError
from workers.engine_control import EngineControl
from workers.engines.base import Engine, GenerationRequest, TokenChunk

_LOOK_S = 0.02


@dataclass(slots=True)
class Rollout:
    """What one rollout got, and when."""

    request: GenerationRequest
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    """Time in s of each batch of tokens."""
    first_of_version: dict[int, int] = field(default_factory=dict)
    """Policy version to the index of the first token that it sampled."""
    ended: bool = False

    def add(self, chunk: TokenChunk, now_s: float) -> None:
        """Take new tokens."""
        if chunk.token_ids:
            self.first_of_version.setdefault(chunk.policy_version, len(self.tokens))
            self.arrivals.append(now_s)
            self.tokens += chunk.token_ids
            self.logprobs += chunk.behavior_logprobs
        self.ended = chunk.finish is not None


class Traffic:
    """``count`` rollouts at any time: one that ends is replaced."""

    def __init__(self, engine: Engine, load: Load) -> None:
        self._requests = _endless(load)
        self._count = load.rollouts
        self._wake = asyncio.Event()
        self._refill: asyncio.Task[None] | None = None
        self.control = EngineControl(lambda _: engine, self._on_tokens, self._wake)
        self.running: dict[str, Rollout] = {}
        self.finished = 0

    async def start(self) -> None:
        """Submit the first rollouts; the engine runs already."""
        self._refill = asyncio.create_task(self._keep_full(), name="refill")
        self._wake.set()

    async def stop(self) -> None:
        """End the rollouts' supply, then the engine."""
        if self._refill is not None:
            self._refill.cancel()
            await asyncio.gather(self._refill, return_exceptions=True)
        await self.control.stop()

    def check(self) -> None:
        """Raise what made the engine or the supply fail."""
        if self.control.failed is not None:
            raise self.control.failed
        if self._refill is not None and self._refill.done():
            self._refill.result()

    async def until_new_tokens(
        self, rollouts: Sequence[Rollout], version: int, limit_s: float
    ) -> None:
        """Wait until each of these has ended or got a token of ``version``.

        Raises ``EngineError`` after ``limit_s``.
        """
        deadline_s = time.monotonic() + limit_s
        while any(not one.ended and version not in one.first_of_version for one in rollouts):
            self.check()
            if time.monotonic() > deadline_s:
                raise EngineError(f"some rollout got no token of version {version} in {limit_s} s")
            await asyncio.sleep(_LOOK_S)

    async def _keep_full(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            wanted = [next(self._requests) for _ in range(self._count - len(self.running))]
            for request in wanted:
                self.running[request.request_id] = Rollout(request)
            if wanted:
                await self.control.submit(wanted)

    def _on_tokens(self, chunks: Sequence[TokenChunk]) -> None:
        now_s = time.perf_counter()
        for chunk in chunks:
            rollout = self.running[chunk.request_id]
            rollout.add(chunk, now_s)
            if rollout.ended:
                del self.running[chunk.request_id]
                self.finished += 1
                self._wake.set()


def _endless(load: Load) -> Iterator[GenerationRequest]:
    """Group after group; the engine meets no prompt twice."""
    for salt in itertools.count():
        for group in load.groups(salt):
            for i in range(group.size):
                name = f"{salt}.{group.group_id}.{i}"
                yield GenerationRequest(name, group.prompt_ids, (), group.max_new_tokens, i)


def longest_gap(arrivals: Sequence[float], begin_s: float, end_s: float) -> float | None:
    """The longest time between two arrivals in a row that overlaps ``begin_s`` to ``end_s``.

    None for a rollout that had nothing before or got nothing after: it was not there all the time.
    """
    first, last = bisect_right(arrivals, begin_s) - 1, bisect_left(arrivals, end_s)
    if first < 0 or last >= len(arrivals):
        return None
    return max(b - a for a, b in itertools.pairwise(arrivals[first : last + 1]))


def usual_gap(arrivals: Sequence[float], begin_s: float, end_s: float) -> float | None:
    """Median time between two arrivals in a row, both within; None with fewer than three."""
    within = arrivals[bisect_left(arrivals, begin_s) : bisect_right(arrivals, end_s)]
    if len(within) < 3:
        return None
    return statistics.median(b - a for a, b in itertools.pairwise(within))
