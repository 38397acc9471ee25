"""Arms of ``benchmarks.vllm_worker``: a bare AsyncLLM, and how any arm's round is watched."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.vllm_models import total_tokens
from benchmarks.worker_arms import Speed
from ringasync.broker.types import NewGroup
from workers.engines.vllm import plugin

_LOOK_S = 0.02
_FULL_FROM, _FULL_TO = 0.1, 0.5
"""Shares of a round's tokens between which the batch is surely full, with two rollouts a place."""

Mark = tuple[float, int]
"""Time in s, tokens so far."""


@dataclass(frozen=True, slots=True)
class ArmRound:
    """One round of one arm. Prompt tokens are 0 for arms that do not count them."""

    speed: Speed
    full_tokens_per_s: float
    """While the batch is full: the round's end, a few long rollouts, left out."""
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0


async def watched(
    call: Awaitable[Speed], tokens: Callable[[], int], total: int
) -> tuple[Speed, float]:
    """A round's speed, and its tokens/s while the batch is full."""
    marks: list[Mark] = []

    async def look() -> None:
        while True:
            marks.append((time.perf_counter(), tokens()))
            await asyncio.sleep(_LOOK_S)

    looking = asyncio.create_task(look())
    try:
        speed = await call
    finally:
        looking.cancel()
    return speed, full_rate(marks, total)


def full_rate(marks: Sequence[Mark], total: int) -> float:
    """Tokens/s between the marks at a tenth and at half of all tokens; 0 with too few marks."""
    middle = [mark for mark in marks if _FULL_FROM * total <= mark[1] <= _FULL_TO * total]
    if len(middle) < 2 or middle[-1][0] <= middle[0][0]:
        return 0.0
    return (middle[-1][1] - middle[0][1]) / (middle[-1][0] - middle[0][0])


class PlainArm:
    """AsyncLLM as one would use it: a task and an async generator for each request."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = arguments
        self._engine: Any = None
        self._rounds = itertools.count()
        self.tokens = 0

    async def start(self) -> None:
        """Blocks the event loop until EngineCore serves: nothing else runs yet."""
        os.environ[plugin.OWNER_VARIABLE] = str(os.getpid())
        plugin.register()
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**self._arguments))

    async def stop(self) -> None:
        """Safe to call twice."""
        engine, self._engine = self._engine, None
        if engine is not None:
            await asyncio.to_thread(engine.shutdown)

    async def round(self, groups: Sequence[NewGroup]) -> Speed:
        """All rollouts of ``groups``: ids and log-probs of each in lists, as a trainer needs."""
        number, self.tokens = next(self._rounds), 0
        began = time.perf_counter(), time.process_time()
        async with asyncio.TaskGroup() as tasks:
            for group in groups:
                for i in range(group.size):
                    tasks.create_task(self._rollout(f"{number}.{group.group_id}.{i}", group))
        wall_s, cpu_s = time.perf_counter() - began[0], time.process_time() - began[1]
        expected = total_tokens(groups)
        assert self.tokens == expected, f"{self.tokens} tokens were generated, not {expected}"
        return Speed(self.tokens / wall_s, cpu_s / self.tokens * 1e6)

    async def _rollout(self, name: str, group: NewGroup) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            max_tokens=group.max_new_tokens,
            logprobs=0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        prompt = {"prompt_token_ids": list(group.prompt_ids)}
        token_ids: list[int] = []
        logprobs: list[float] = []
        async for output in self._engine.generate(prompt, sampling, name):
            found = output.outputs[0]
            for token, row in zip(found.token_ids, found.logprobs or (), strict=True):
                token_ids.append(token)
                logprobs.append(row[token].logprob)
            self.tokens += len(found.token_ids)
