"""Where the generation thread of transformers puts tokens and the asyncio side takes them."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus

from ringasync.errors import EngineError
from workers.engines.base import EngineFinish, GenerationRequest, TokenChunk
from workers.token_trace import Sampled, wanted_trace


class LiveRequestState(RequestState):  # type: ignore[misc]
    """A request of the manager that is its own result.

    The stock one copies all tokens so far for every token; here the outbox reads what is new.
    """

    def to_generation_output(self) -> Any:
        """The state itself: it has the fields of a ``GenerationOutput`` that are read here."""
        return self


@dataclass(slots=True)
class RunningRequest:
    """One request as the manager knows it. ``internal_id`` changes with each re-adding."""

    request: GenerationRequest
    internal_id: str
    generated: list[int] = field(default_factory=list)
    delivered: int = 0
    """Tokens of the present internal request that were taken."""

    @property
    def tokens_before(self) -> int:
        """Tokens of the response from earlier leases and earlier internal requests."""
        return len(self.request.prefix_ids) + len(self.generated) - self.delivered


class Outbox(OutputRouter):  # type: ignore[misc]
    """Learns in the manager's thread which requests have news; takes the tokens when asked.

    So the generation thread spends next to nothing on a step. ``policy_version`` labels what is
    taken; ``relabel`` changes it, only while the manager is paused.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        policy_version: int,
        eos: frozenset[int],
        gather_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.running: dict[str, RunningRequest] = {}
        self.filled = asyncio.Event()
        self.urgent = asyncio.Event()
        """A request ended (or failed), so its place in the batch is free; or ``gather_tokens`` of
        some request wait to be taken."""
        self._policy_version = policy_version
        self._by_request: dict[str, str] = {}
        self._error: str | None = None
        self._lock = threading.Lock()
        self._loop = loop
        self._eos = eos
        self._news: dict[str, Any] = {}
        self._chunks: list[TokenChunk] = []
        self._waking = False
        self._urging = False
        self._gather_tokens = gather_tokens
        self._steps = 0
        """Steps since the last ``drain``: no request has more tokens waiting."""
        self._trace = wanted_trace()

    # Called in the manager's thread.

    def deliver(self, output: Any) -> None:
        """One request has news."""
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[Any]) -> None:
        """All requests of one step have news."""
        with self._lock:
            self._steps += 1
            urgent = 0 < self._gather_tokens <= self._steps
            for output in outputs:
                self._news[output.request_id] = output
                urgent = urgent or output.status >= RequestStatus.FINISHED
                if output.status == RequestStatus.FAILED and output.request_id in self.running:
                    self._error = output.error or "request failed without a message"
            if self._trace is not None:
                self._trace.write([*self._sampled(outputs)])
            wake = not self._waking or (urgent and not self._urging)
            self._waking, self._urging = True, self._urging or urgent
        if wake:
            # The loop may be closed already when a process is going down.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._wake, urgent)

    def _sampled(self, outputs: list[Any]) -> Iterator[Sampled]:
        for output in outputs:
            running = self.running.get(output.request_id)
            if running is not None:
                tokens = running.tokens_before + len(output.logprobs)
                yield running.request.request_id, tokens, self._policy_version

    def _wake(self, urgent: bool) -> None:
        self.filled.set()
        if urgent:
            self.urgent.set()

    # Called from the asyncio side.

    def drain(self) -> list[TokenChunk]:
        """All tokens so far, one chunk for each request and version."""
        with self._lock:
            self._take_all()
            chunks, self._chunks = self._chunks, []
            self._waking = self._urging = False
            self._steps = 0
            self.filled.clear()
            self.urgent.clear()
        return chunks

    def relabel(self, policy_version: int) -> None:
        """What is sampled from now on is of this version; call while the manager is paused."""
        with self._lock:
            self._take_all()
            self._policy_version = policy_version

    def check(self) -> None:
        """Raise ``EngineError`` when the generation thread failed."""
        if self._error is not None:
            raise EngineError(f"the generation thread failed: {self._error}")

    def fail(self, message: str) -> None:
        """Note that nothing will come any more."""
        with self._lock:
            self._error = self._error or message

    def add(self, request: GenerationRequest, internal_id: str) -> None:
        """Expect tokens of a request. Raises ``ValueError`` when it is running already."""
        with self._lock:
            if request.request_id in self._by_request:
                raise ValueError(f"request {request.request_id} is running already")
            self.running[internal_id] = RunningRequest(request, internal_id)
            self._by_request[request.request_id] = internal_id

    def remove(self, request_id: str) -> str | None:
        """Take what a request has, then nothing more; returns the manager's id, if it ran."""
        with self._lock:
            internal_id = self._by_request.get(request_id)
            if internal_id is not None:
                if internal_id in self._news:
                    self._take(self.running[internal_id], self._news.pop(internal_id))
                self._forget(internal_id, request_id)
            return internal_id

    def rename(self, running: RunningRequest, internal_id: str) -> None:
        """The request goes on in the manager under a new id."""
        with self._lock:
            self._forget(running.internal_id, running.request.request_id)
            running.internal_id, running.delivered = internal_id, 0
            self.running[internal_id] = running
            self._by_request[running.request.request_id] = internal_id

    def _take_all(self) -> None:
        news, self._news = self._news, {}
        for internal_id, output in news.items():
            # News of a request that was cancelled finds nobody.
            running = self.running.get(internal_id)
            if running is not None and output.status != RequestStatus.FAILED:
                self._take(running, output)

    def _take(self, running: RunningRequest, output: Any) -> None:
        """Cut what is new out of the manager's lists, which its thread may be extending."""
        finished = output.status == RequestStatus.FINISHED
        begin = running.delivered
        # It extends tokens first, then log-probs, then sets the status: read the other way round.
        end = len(output.logprobs)
        tokens = tuple(output.generated_tokens[begin:end])
        logprobs = tuple(output.logprobs[begin:end])
        running.delivered = end
        running.generated.extend(tokens)
        finish: EngineFinish | None = None
        if finished:
            finish = "stop" if running.generated[-1] in self._eos else "length"
            self._forget(running.internal_id, running.request.request_id)
        if tokens or finished:
            self._chunks.append(
                TokenChunk(
                    running.request.request_id, tokens, logprobs, self._policy_version, finish
                )
            )

    def _forget(self, internal_id: str, request_id: str) -> None:
        self.running.pop(internal_id, None)
        self._by_request.pop(request_id, None)
