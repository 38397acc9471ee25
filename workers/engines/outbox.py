"""Where the generation thread of transformers puts tokens and the asyncio side takes them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from dataclasses import dataclass, field
from typing import Any

from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import RequestStatus

from ringasync.errors import EngineError
from workers.engines.base import EngineFinish, GenerationRequest, TokenChunk


@dataclass(slots=True)
class RunningRequest:
    """One request as the manager knows it. ``internal_id`` changes with each re-adding."""

    request: GenerationRequest
    internal_id: str
    generated: list[int] = field(default_factory=list)
    delivered: int = 0
    """Tokens of the present internal request that were handed out."""


class Outbox(OutputRouter):  # type: ignore[misc]
    """Receives tokens in the manager's thread and keeps them for ``outputs``.

    ``policy_version`` labels what arrives; it changes only while the manager is paused.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, policy_version: int, eos: frozenset[int]):
        super().__init__()
        self.policy_version = policy_version
        self.running: dict[str, RunningRequest] = {}
        self.by_request: dict[str, str] = {}
        self.error: str | None = None
        self.filled = asyncio.Event()
        self.lock = threading.Lock()
        self._loop = loop
        self._eos = eos
        self._chunks: list[TokenChunk] = []
        self._waking = False

    def deliver(self, output: Any) -> None:
        """Take one result of the manager."""
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[Any]) -> None:
        """Take all results of one step; results of cancelled requests are dropped."""
        with self.lock:
            for output in outputs:
                running = self.running.get(output.request_id)
                if running is None:
                    continue
                if output.status == RequestStatus.FAILED:
                    self.error = output.error or "request failed without a message"
                else:
                    self._chunks.append(self._take(running, output))
            wake = bool(self._chunks or self.error) and not self._waking
            self._waking = self._waking or wake
        if wake:
            # The loop may be closed already when a process is going down.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self.filled.set)

    def _take(self, running: RunningRequest, output: Any) -> TokenChunk:
        """Cut what is new out of the manager's cumulative result."""
        tokens = tuple(output.generated_tokens[running.delivered :])
        logprobs = tuple(output.logprobs[running.delivered :])
        running.delivered += len(tokens)
        running.generated.extend(tokens)
        finish: EngineFinish | None = None
        if output.status == RequestStatus.FINISHED:
            finish = "stop" if running.generated[-1] in self._eos else "length"
            self._forget(running)
        return TokenChunk(running.request.request_id, tokens, logprobs, self.policy_version, finish)

    def drain(self) -> list[TokenChunk]:
        """All chunks so far."""
        with self.lock:
            chunks, self._chunks = self._chunks, []
            self._waking = False
            self.filled.clear()
        return chunks

    def check(self) -> None:
        """Raise ``EngineError`` when the generation thread failed."""
        if self.error is not None:
            raise EngineError(f"the generation thread failed: {self.error}")

    def fail(self, message: str) -> None:
        """Note that nothing will come any more."""
        with self.lock:
            self.error = self.error or message

    def add(self, request: GenerationRequest, internal_id: str) -> None:
        """Expect tokens of a request."""
        with self.lock:
            if request.request_id in self.by_request:
                raise ValueError(f"request {request.request_id} is running already")
            self.running[internal_id] = RunningRequest(request, internal_id)
            self.by_request[request.request_id] = internal_id

    def remove(self, request_id: str) -> str | None:
        """Deliver nothing more of a request; returns the manager's id of it, if it ran."""
        with self.lock:
            internal_id = self.by_request.get(request_id)
            if internal_id is not None:
                self._forget(self.running[internal_id])
            return internal_id

    def rename(self, running: RunningRequest, internal_id: str) -> None:
        """The request goes on in the manager under a new id."""
        with self.lock:
            del self.running[running.internal_id]
            running.internal_id, running.delivered = internal_id, 0
            self.running[internal_id] = running
            self.by_request[running.request.request_id] = internal_id

    def _forget(self, running: RunningRequest) -> None:
        self.running.pop(running.internal_id, None)
        self.by_request.pop(running.request.request_id, None)


def merge_chunks(chunks: list[TokenChunk]) -> list[TokenChunk]:
    """Join chunks of the same request and version, keeping the order of first appearance."""
    joined: dict[tuple[str, int], list[TokenChunk]] = {}
    for chunk in chunks:
        joined.setdefault((chunk.request_id, chunk.policy_version), []).append(chunk)
    return [
        parts[0]
        if len(parts) == 1
        else TokenChunk(
            request_id,
            tuple(itertools.chain.from_iterable(part.token_ids for part in parts)),
            tuple(itertools.chain.from_iterable(part.behavior_logprobs for part in parts)),
            version,
            parts[-1].finish,
        )
        for (request_id, version), parts in joined.items()
    ]
