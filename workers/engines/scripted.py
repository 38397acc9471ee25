"""A deterministic engine without a model, for protocol tests and simulations.

Its "language model" is a hash: the digest of the weights and the last tokens of the context give
the logits of the next token. So log-probs can be checked exactly, also over a swap, and a swap
that was not applied shows. It passes the same contract tests as the real engines.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ringasync.errors import EngineError
from ringasync.records.weights import WeightManifest
from workers.engines.base import (
    EngineFinish,
    GenerationRequest,
    SamplingParams,
    ScoreRequest,
    TokenChunk,
)
from workers.token_trace import wanted_trace

VOCAB_SIZE = 32
_MEMORY_TOKENS = 8


@dataclass(frozen=True, slots=True)
class ScriptedOptions:
    """``worker.engine_options``: the pause between two steps, each one token a rollout."""

    step_interval_s: float = 0.0


def write_scripted_weights(weights_dir: Path, value: float) -> Path:
    """Write a folder that ``ScriptedEngine`` loads: any other ``value`` is another policy."""
    weights_dir.mkdir(parents=True, exist_ok=True)
    tensors = {
        "model.scale": np.asarray([value], dtype=np.float32),
        "model.table": np.full((4, 8), value, dtype=np.float32),
    }
    save_file(tensors, weights_dir / "model.safetensors")
    (weights_dir / "config.json").write_text('{"model_type": "scripted"}')
    return weights_dir


def scripted_logprobs(
    tensors: dict[str, npt.NDArray[np.generic]], context: Sequence[int], temperature: float
) -> npt.NDArray[np.float32]:
    """Log-probs [VOCAB_SIZE] of the token after ``context`` under these weights."""
    return _next_logprobs(_policy_key(tensors), context, temperature)


def _policy_key(tensors: dict[str, npt.NDArray[np.generic]]) -> bytes:
    state = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        state.update(name.encode() + tensors[name].tobytes())
    return state.digest()


def _next_logprobs(
    policy: bytes, context: Sequence[int], temperature: float
) -> npt.NDArray[np.float32]:
    recent = np.asarray(context[-_MEMORY_TOKENS:], dtype="<i4").tobytes()
    key = hashlib.blake2b(policy + recent, digest_size=2 * VOCAB_SIZE).digest()
    bits = np.frombuffer(key, dtype="<u2")[:VOCAB_SIZE]
    logits = (bits.astype(np.float64) / 65536.0 * 4.0) / temperature
    logits -= logits.max()
    return np.asarray(logits - np.log(np.exp(logits).sum()), dtype=np.float32)


@dataclass(slots=True)
class _Running:
    request: GenerationRequest
    random: np.random.Generator
    generated: list[int] = field(default_factory=list)

    @property
    def context(self) -> list[int]:
        recent = self.generated[-_MEMORY_TOKENS:]
        before = (*self.request.prompt_ids, *self.request.prefix_ids)[-_MEMORY_TOKENS:]
        return [*before, *recent]

    @property
    def length(self) -> int:
        """Tokens of the whole response, those of earlier leases included."""
        return len(self.request.prefix_ids) + len(self.generated)


class ScriptedEngine:
    """Implements ``workers.engines.base.Engine`` with a hash for a model.

    With ``step_interval_s`` it steps by itself, one token for every request a step; with None only
    ``step`` moves it, so that a test decides what has been sampled when.
    """

    checks_weights = False

    def __init__(
        self,
        sampling: SamplingParams,
        *,
        step_interval_s: float | None = 0.0,
        max_concurrent: int = 64,
        seed: int = 0,
        renews_kv: bool = False,
    ) -> None:
        """A hash has no KV, so ``renews_kv`` changes only what others do."""
        self.renews_kv = renews_kv
        self._sampling = sampling
        self._step_interval_s = step_interval_s
        self._max_concurrent = max_concurrent
        self._seed = seed
        self._tensors: dict[str, npt.NDArray[np.generic]] = {}
        self._policy = b""
        self._policy_version = 0
        self._running: dict[str, _Running] = {}
        self._chunks: list[TokenChunk] = []
        self._filled = asyncio.Event()
        self._may_step = asyncio.Event()
        self._paused = False
        self._asleep = False
        self._alive = False
        self._error: str | None = None
        self._ticker: asyncio.Task[None] | None = None
        self._prompt_tokens = 0
        self._trace = wanted_trace()

    @property
    def active(self) -> int:
        """Requests that are not finished."""
        return len(self._running)

    @property
    def prompt_tokens(self) -> tuple[int, int]:
        """See ``Engine.prompt_tokens``; there is no prefix cache."""
        return self._prompt_tokens, 0

    async def start(self, weights_dir: Path, policy_version: int) -> None:
        """See ``Engine.start``."""
        if self._alive:
            raise EngineError("the engine is running already")
        self._install(self._read(weights_dir), policy_version)
        self._alive = True
        if self._step_interval_s is not None:
            self._ticker = asyncio.create_task(self._tick(self._step_interval_s))

    async def stop(self) -> None:
        """See ``Engine.stop``."""
        self._alive = False
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.gather(self._ticker, return_exceptions=True)
            self._ticker = None

    async def generate(self, requests: Sequence[GenerationRequest]) -> None:
        """See ``Engine.generate``."""
        self._require()
        for request in requests:
            if request.request_id in self._running:
                raise ValueError(f"request {request.request_id} is running already")
            if not (request.prompt_ids or request.prefix_ids) or request.max_new_tokens < 1:
                raise ValueError(
                    f"request {request.request_id} has no context or nothing to sample"
                )
            random = np.random.default_rng([self._seed, request.seed, len(request.prefix_ids)])
            self._running[request.request_id] = _Running(request, random)
            self._prompt_tokens += len(request.prompt_ids) + len(request.prefix_ids)
        self._may_step.set()

    async def outputs(self) -> list[TokenChunk]:
        """See ``Engine.outputs``."""
        while not self._chunks:
            self._require()
            self._filled.clear()
            await self._filled.wait()
        return self.drain()

    def drain(self) -> list[TokenChunk]:
        """See ``Engine.drain``."""
        chunks, self._chunks = self._chunks, []
        return chunks

    async def abort(self, request_ids: Sequence[str]) -> None:
        """See ``Engine.abort``."""
        self._require()
        for request_id in request_ids:
            self._running.pop(request_id, None)

    async def pause(self) -> None:
        """See ``Engine.pause``."""
        self._require()
        self._paused = True

    async def prepare(self, weights_dir: Path, manifest: WeightManifest | None = None) -> str:
        """See ``Engine.prepare``."""
        self._require()
        return "file"

    async def load_weights(self, weights_dir: Path, policy_version: int) -> None:
        """See ``Engine.load_weights``."""
        self._require()
        if not self._paused:
            raise EngineError("load_weights needs a paused engine")
        self._install(self._read(weights_dir), policy_version)

    async def sleep(self) -> None:
        """See ``Engine.sleep``. There is nothing to free."""
        self._require()
        self._paused = self._asleep = True

    async def wake(self) -> None:
        """See ``Engine.wake``."""
        self._require()
        self._asleep = False

    async def resume(self) -> None:
        """See ``Engine.resume``."""
        self._require_awake()
        self._paused = False
        self._may_step.set()

    async def score(self, requests: Sequence[ScoreRequest]) -> list[npt.NDArray[np.float32]]:
        """See ``Engine.score``."""
        self._require_awake()
        return [
            np.asarray(
                [
                    _next_logprobs(
                        self._policy, [*request.prompt_ids, *request.token_ids[:i]], 1.0
                    )[token]
                    for i, token in enumerate(request.token_ids)
                ],
                dtype=np.float32,
            )
            for request in requests
        ]

    async def read_back(self) -> dict[str, str]:
        """See ``Engine.read_back``."""
        self._require_awake()
        return {
            name: xxhash.xxh3_128_hexdigest(np.ascontiguousarray(tensor).tobytes())
            for name, tensor in self._tensors.items()
        }

    def step(self, count: int = 1) -> None:
        """Sample ``count`` tokens for each of the oldest requests, unless paused."""
        for _ in range(count):
            if self._paused or not self._alive:
                return
            chosen = list(itertools.islice(self._running.values(), self._max_concurrent))
            self._chunks += [self._sample(running) for running in chosen]
            if self._trace is not None:
                version = self._policy_version
                self._trace.write([(r.request.request_id, r.length, version) for r in chosen])
        if self._chunks:
            self._filled.set()

    def kill(self, message: str = "killed by a test") -> None:
        """Die as an engine process would: nothing is delivered any more."""
        self._alive, self._error = False, message
        self._running.clear()
        self._filled.set()

    def _sample(self, running: _Running) -> TokenChunk:
        request = running.request
        logprobs = _next_logprobs(self._policy, running.context, self._sampling.temperature)
        thresholds = np.cumsum(np.exp(logprobs.astype(np.float64)))
        draw = running.random.random() * thresholds[-1]
        token = min(int(np.searchsorted(thresholds, draw, side="right")), VOCAB_SIZE - 1)
        running.generated.append(token)
        finish: EngineFinish | None = None
        if token in self._sampling.eos_token_ids:
            finish = "stop"
        elif len(running.generated) >= request.max_new_tokens:
            finish = "length"
        if finish is not None:
            del self._running[request.request_id]
        return TokenChunk(
            request.request_id, (token,), (float(logprobs[token]),), self._policy_version, finish
        )

    async def _tick(self, interval_s: float) -> None:
        while True:
            if not self._running or self._paused:
                self._may_step.clear()
                await self._may_step.wait()
            self.step()
            await asyncio.sleep(interval_s)

    def _read(self, weights_dir: Path) -> dict[str, npt.NDArray[np.generic]]:
        try:
            return dict(load_file(weights_dir / "model.safetensors"))
        except (OSError, SafetensorError) as error:
            raise EngineError(f"{weights_dir} cannot be loaded: {error}") from error

    def _install(self, tensors: dict[str, npt.NDArray[np.generic]], policy_version: int) -> None:
        self._tensors, self._policy = tensors, _policy_key(tensors)
        self._policy_version = policy_version

    def _require(self) -> None:
        if not self._alive:
            raise EngineError(self._error or "the engine is not running")

    def _require_awake(self) -> None:
        self._require()
        if self._asleep:
            raise EngineError("the engine is asleep: wake it first")
