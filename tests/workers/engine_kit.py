"""How the engine contract makes engines and collects what they deliver."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from workers.engines.base import (
    Engine,
    EngineFinish,
    GenerationRequest,
    SamplingParams,
    TokenChunk,
)

TIMEOUT_S = 30.0
NEVER_SAMPLED = 10**6
"""An EOS id outside every vocabulary: rollouts end by length only."""

Reference = Callable[[Path, Sequence[int], Sequence[int], float], npt.NDArray[np.float32]]
"""(weights, context, tokens, temperature) to log-probs [T] of the tokens by an independent way."""


@dataclass(frozen=True)
class EngineKit:
    """How the suite makes an engine of one kind.

    ``weights(i)`` gives folder i of at least two different policies of the same shape.
    ``kill`` makes a running engine die as it would in life.
    """

    make: Callable[[SamplingParams], Engine]
    weights: Callable[[int], Path]
    reference: Reference
    kill: Callable[[Any], None]
    vocab_size: int
    max_gap_nats: float = 1e-4
    """Largest log-prob gap to the reference; half precision needs more than float32."""


@dataclass
class Collected:
    """Everything one request delivered."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish: EngineFinish | None = None

    def take(self, chunk: TokenChunk) -> None:
        """Add a chunk, which must not come after the request's end."""
        assert self.finish is None, f"{chunk.request_id} delivered after its end"
        assert len(chunk.token_ids) == len(chunk.behavior_logprobs)
        self.tokens.extend(chunk.token_ids)
        self.logprobs.extend(chunk.behavior_logprobs)
        self.versions.extend([chunk.policy_version] * len(chunk.token_ids))
        self.finish = chunk.finish


class Collector:
    """Reads an engine's outputs and checks that nothing comes after a request's end."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.requests: dict[str, Collected] = {}

    def __getitem__(self, request_id: str) -> Collected:
        return self.requests.setdefault(request_id, Collected())

    async def read(self) -> None:
        """Take one batch of outputs."""
        async with asyncio.timeout(TIMEOUT_S):
            chunks = await self.engine.outputs()
        for chunk in chunks:
            self[chunk.request_id].take(chunk)

    async def until_finished(self, *request_ids: str) -> None:
        """Read until all these requests ended."""
        while any(self[request_id].finish is None for request_id in request_ids):
            await self.read()

    async def until_tokens(self, request_id: str, count: int) -> None:
        """Read until a request has at least ``count`` tokens."""
        while len(self[request_id].tokens) < count:
            await self.read()

    async def rest(self) -> None:
        """Take what lies in the queue now; does not wait for more."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                while True:
                    await self.read()


def request(
    name: str, prompt: Sequence[int], max_new_tokens: int, prefix: Sequence[int] = ()
) -> GenerationRequest:
    """A request with a seed of its own."""
    return GenerationRequest(
        name, tuple(prompt), tuple(prefix), max_new_tokens, xxhash.xxh32_intdigest(name.encode())
    )


def prompts(kit: EngineKit, count: int) -> list[list[int]]:
    """Prompts of different lengths over the whole vocabulary."""
    random = np.random.default_rng(7)
    return [random.integers(1, kit.vocab_size, 3 + 5 * (i % 6)).tolist() for i in range(count)]
