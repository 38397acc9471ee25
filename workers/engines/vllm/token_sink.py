"""Takes the tokens of each step straight out of EngineCore's answer.

AsyncLLM's own output processor makes, for every token of every request, a ``RequestOutput``, a
``CompletionOutput``, a ``Logprob`` in a dictionary and a wake-up of that request's task: at a
thousand requests the interpreter, not the GPU, sets the pace. ``TokenSink`` stands in its place
and keeps ids and log-probs in two plain lists a request, which ``drain`` turns into one chunk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ringasync.records.routing import RoutedRows
from workers.engines.base import EngineFinish, TokenChunk
from workers.engines.vllm.packing import StepLogprobs
from workers.engines.vllm.routed_experts import RoutedShape

_STOP, _LENGTH, _ABORT = 0, 1, 2  # vllm.v1.engine.FinishReason


@dataclass(slots=True)
class _Request:
    """One request; ``tokens`` and ``logprobs`` are what was not taken yet."""

    request_id: str
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: EngineFinish | None = None
    routed: list[RoutedRows] = field(default_factory=list)
    has_context_rows: bool = False


@dataclass(slots=True)
class _Scoring:
    """A request that asks for the log-probs of its own prompt."""

    first: int
    """Rows before this one belong to the context and are not wanted."""
    done: asyncio.Future[npt.NDArray[np.float32]]
    parts: list[npt.NDArray[np.float32]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Barrier:
    """Stands in EngineCore's queue of answers: all before it have been taken when it is met."""

    reached: asyncio.Event


@dataclass(slots=True)
class ProcessedOutputs:
    """What AsyncLLM's output loop reads of an output processor's answer."""

    request_outputs: list[Any] = field(default_factory=list)
    reqs_to_abort: list[str] = field(default_factory=list)


class TokenSink:
    """An output processor as ``AsyncLLM`` knows it, and the source of ``Engine.outputs``.

    Requests are known by vLLM's internal ids, which it never uses twice; ours may come again.
    """

    def __init__(self, policy_version: int, gather_tokens: int = 0) -> None:
        """``gather_tokens`` of one request are urgent, so that a crash loses no more; 0: never."""
        self.filled = asyncio.Event()
        self.urgent = asyncio.Event()
        """A request ended, so its place in the batch is free; or ``gather_tokens`` wait."""
        self.error: str | None = None
        self.prompt_tokens = 0
        self.cached_prompt_tokens = 0
        """Of them, those whose KV the prefix cache had."""
        self.other_labels = 0
        """Outputs that vLLM itself labels with another version than we do."""
        self.routed_shape: RoutedShape | None = None
        """Set where the engine was asked for routed experts."""
        self._policy_version = policy_version
        self._logprobs = StepLogprobs()
        self._gather_tokens = gather_tokens
        self._steps = 0
        """Steps since the last ``drain``: no request has more tokens waiting."""
        self._running: dict[str, _Request] = {}
        self._scoring: dict[str, _Scoring] = {}
        self._internal: dict[str, str] = {}
        self._wanted_scores: dict[str, _Scoring] = {}
        self._news: dict[str, _Request] = {}
        self._chunks: list[TokenChunk] = []

    # What AsyncLLM calls. Names and arguments are vLLM's.

    def add_request(self, request: Any, *_: Any, **__: Any) -> None:
        """A request is about to be sent to EngineCore."""
        internal_id, ours = request.request_id, request.external_req_id
        scoring = self._wanted_scores.pop(ours, None)
        if scoring is not None:
            self._scoring[internal_id] = scoring
            return
        self._running[internal_id] = _Request(ours)
        self._internal[ours] = internal_id

    def process_outputs(
        self, outputs: Sequence[Any], *_: Any, weight_version: str | None = None
    ) -> ProcessedOutputs:
        """Keep the new tokens of one step's outputs; vLLM says their version since 0.32."""
        running, news, ended = self._running, self._news, False
        if weight_version is not None and weight_version != str(self._policy_version):
            self.other_labels += len(outputs)
        for output in outputs:
            internal_id = output.request_id
            logprobs = self._logprobs.of(output)
            request = running.get(internal_id)
            if request is None:
                self._note_score(internal_id, output)
                continue
            tokens = output.new_token_ids
            if tokens:
                request.tokens += tokens
                request.logprobs += logprobs
                if self.routed_shape is not None:
                    self._note_routed(self.routed_shape, request, output)
                news[internal_id] = request
            if output.prefill_stats is not None:
                self._count_prefill(output.prefill_stats)
            if output.finish_reason is not None:
                ended = True
                self._end(internal_id, request, output.finish_reason)
        if news or self._chunks:
            self.filled.set()
        if ended:
            self.urgent.set()
        return ProcessedOutputs()

    def abort_requests(self, request_ids: Iterable[str], internal: bool = False) -> list[str]:
        """What the requests had sampled stays to be taken; later tokens of theirs are dropped."""
        gone = []
        for request_id in request_ids:
            internal_id = request_id if internal else self._internal.get(request_id, "")
            request = self._running.pop(internal_id, None)
            if request is not None:
                self._forget(internal_id, request)
                gone.append(internal_id)
            elif self._scoring.pop(internal_id, None) is not None:
                gone.append(internal_id)
        return gone

    def update_scheduler_stats(self, stats: Any) -> None:
        """Called after each answer; a barrier comes this way."""
        if isinstance(stats, _Barrier):
            stats.reached.set()
            return
        self._steps += 1
        if 0 < self._gather_tokens <= self._steps and self._news:
            self.urgent.set()

    def propagate_error(self, error: Exception) -> None:
        """The output loop ends: EngineCore is dead, or its answer could not be read."""
        self.fail(f"{type(error).__name__}: {error}")

    def has_unfinished_requests(self) -> bool:
        """Whether anything is running."""
        return bool(self._running or self._scoring)

    def has_request(self, request_id: str) -> bool:
        """Whether a request of this internal id is running."""
        return request_id in self._running or request_id in self._scoring

    def get_num_unfinished_requests(self) -> int:
        """How many requests are running."""
        return len(self._running) + len(self._scoring)

    def get_num_queued_tokens(self) -> int:
        """For vLLM's admission control, which is off: workers take no more than they can run."""
        return 0

    # What the engine calls.

    def drain(self) -> list[TokenChunk]:
        """All tokens so far, one chunk for each request and version."""
        self._take_news()
        chunks, self._chunks = self._chunks, []
        self._steps = 0
        self.filled.clear()
        self.urgent.clear()
        return chunks

    def relabel(self, policy_version: int) -> None:
        """What is sampled from now on is of this version; call behind a barrier, while paused."""
        self._take_news()
        self._policy_version = policy_version
        if self._chunks:
            self.filled.set()

    @property
    def policy_version(self) -> int:
        """What is sampled now is of this version."""
        return self._policy_version

    def is_running(self, request_id: str) -> bool:
        """Whether a request of ours is known and not ended."""
        return request_id in self._internal

    def want_score(
        self, request_id: str, first: int, loop: asyncio.AbstractEventLoop
    ) -> asyncio.Future[npt.NDArray[np.float32]]:
        """Expect prompt log-probs under this id; rows from ``first`` on are the result."""
        scoring = _Scoring(first, loop.create_future())
        self._wanted_scores[request_id] = scoring
        return scoring.done

    def fail(self, message: str) -> None:
        """Nothing will come any more: wakes everybody who waits."""
        self.error = self.error or message
        for scoring in (*self._scoring.values(), *self._wanted_scores.values()):
            if not scoring.done.done():
                scoring.done.cancel()
        self._scoring.clear()
        self._wanted_scores.clear()
        self.filled.set()
        self.urgent.set()

    def barrier(self) -> tuple[Any, asyncio.Event]:
        """Something to put into the queue of answers as ``scheduler_stats``, and its event."""
        reached = asyncio.Event()
        return _Barrier(reached), reached

    def _take_news(self) -> None:
        for request in self._news.values():
            self._take(request)
        self._news.clear()

    def _take(self, request: _Request) -> None:
        if request.tokens or request.finish is not None:
            self._chunks.append(
                TokenChunk(
                    request.request_id,
                    tuple(request.tokens),
                    tuple(request.logprobs),
                    self._policy_version,
                    request.finish,
                    np.concatenate(request.routed) if request.routed else None,
                )
            )
            request.tokens, request.logprobs, request.routed = [], [], []

    @staticmethod
    def _note_routed(shape: RoutedShape, request: _Request, output: Any) -> None:
        first, request.has_context_rows = not request.has_context_rows, True
        request.routed.append(
            shape.rows(output.routed_experts, len(output.new_token_ids), first=first)
        )

    def _end(self, internal_id: str, request: _Request, reason: Any) -> None:
        number = int(reason)
        self._running.pop(internal_id)
        if number == _STOP:
            request.finish = "stop"
        elif number == _LENGTH:
            request.finish = "length"
        elif number != _ABORT:
            # An internal error of vLLM for one request: it cannot be told apart from a sick
            # engine, and silence would leave the rollout waiting for ever.
            self.fail(f"vLLM ended request {request.request_id} with {reason}")
        self._forget(internal_id, request)

    def _forget(self, internal_id: str, request: _Request) -> None:
        """Its tokens become a chunk at once: the next request may have the same id of ours."""
        self._news.pop(internal_id, None)
        self._take(request)
        if self._internal.get(request.request_id) == internal_id:
            del self._internal[request.request_id]

    def _note_score(self, internal_id: str, output: Any) -> None:
        scoring = self._scoring.get(internal_id)
        if scoring is None:
            return  # aborted
        tensors = output.new_prompt_logprobs_tensors
        if tensors is not None:
            # [prompt tokens - 1, 1]: with prompt_logprobs=0 the one column is the token's own.
            scoring.parts.append(np.asarray(tensors.logprobs.numpy()[:, 0], dtype=np.float32))
        if output.finish_reason is not None:
            del self._scoring[internal_id]
            rows = np.concatenate(scoring.parts) if scoring.parts else np.zeros(0, np.float32)
            if not scoring.done.done():
                scoring.done.set_result(rows[scoring.first :])

    def _count_prefill(self, stats: Any) -> None:
        self.prompt_tokens += int(stats.num_prompt_tokens)
        self.cached_prompt_tokens += int(stats.num_cached_tokens)
