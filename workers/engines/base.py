"""The engine protocol: what a rollout worker asks of an inference engine.

An engine samples tokens for many requests at once and hands them out in batches. It never talks
to Redis. Weights change only between ``pause`` and ``resume``; every token chunk carries the
policy version that sampled it, and requests in flight go on after a swap with their whole context
recomputed under the new weights (``kv="recompute"``), so that ``behavior_logprobs`` stay true.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from ringasync.records.routing import RoutedRows
from ringasync.records.weights import WeightManifest

EngineFinish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn: full distribution at ``temperature``, nothing cut off."""

    temperature: float
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One rollout to generate on: context is ``prompt_ids + prefix_ids``.

    ``max_new_tokens`` counts tokens still to sample. ``seed`` is used by engines that seed each
    request; others ignore it.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    prefix_ids: tuple[int, ...]
    max_new_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """New tokens of one request, all sampled under ``policy_version``.

    ``behavior_logprobs`` are natural logs of the sampling distribution (after temperature), fp32,
    one for each token id. ``finish`` is set on the last chunk, whose ``token_ids`` may be empty.
    ``stop`` means an EOS token was sampled; it is the last id of the request's tokens.
    ``routed_experts``, of engines asked for it: uint8 or uint16 [R, L, K], the last rows those of
    these tokens, as ``ringasync.records.routing`` says; the rows of the context come before them
    in the first chunk of a request without a prefix.
    """

    request_id: str
    token_ids: tuple[int, ...]
    behavior_logprobs: tuple[float, ...]
    policy_version: int
    finish: EngineFinish | None = None
    routed_experts: RoutedRows | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Tokens whose log-probs are wanted at T = 1, given ``prompt_ids``; prefix cache bypassed."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]


class Engine(Protocol):
    """An inference engine.

    Calls may come from one asyncio task at a time, except ``outputs`` and ``prepare``.
    """

    @property
    def prompt_tokens(self) -> tuple[int, int]:
        """Tokens of context that ``generate`` was given since ``start``, and how many of them a
        prefix cache spared the engine (siblings of a group, resumed partials)."""
        ...

    @property
    def checks_weights(self) -> bool:
        """Whether ``prepare`` compares every tensor with the manifest it is given, so that nobody
        need read the files for their checksums first."""
        ...

    @property
    def renews_kv(self) -> bool:
        """Whether ``load_weights`` leaves requests the KV of the weights before, so that whoever
        submits has to abort and submit them again, with their tokens as context, to have it anew.
        What is submitted after a swap shares no KV with what came before."""
        ...

    async def start(self, weights_dir: Path, policy_version: int) -> None:
        """Load config and weights from an HF-format folder and begin to serve."""
        ...

    async def stop(self) -> None:
        """Release everything; safe to call twice and after a failure."""
        ...

    async def generate(self, requests: Sequence[GenerationRequest]) -> None:
        """Queue requests; their tokens arrive through ``outputs``. Queued while paused."""
        ...

    async def outputs(self) -> list[TokenChunk]:
        """Wait for new tokens and return all that are there, oldest first.

        Waits for: the engine's next step. Unblocked by: tokens, a finished request, or a dead
        engine, which raises ``EngineError``.
        """
        ...

    def drain(self) -> list[TokenChunk]:
        """Return all tokens that are there now, oldest first, without waiting. Never raises.

        After ``pause`` it gives everything that was sampled, whoever else waits in ``outputs``.
        """
        ...

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Stop requests. Tokens already sampled still come out of ``outputs`` before this returns
        or are in its queue when it returns; none is delivered later. Unknown ids are ignored."""
        ...

    async def pause(self) -> None:
        """Stop stepping. When this returns, every token sampled so far is in the output queue."""
        ...

    async def prepare(self, weights_dir: Path, manifest: WeightManifest | None = None) -> str:
        """Take in the next weights while generation goes on, so that ``load_weights`` is short.

        Optional: ``load_weights`` does it where it was not done. May run beside other calls. An
        engine that can pulls the tensors from ``manifest.peer`` rather than read the files.
        Returns the way they came: ``file``, ``socket`` or ``nccl``. Raises ``EngineError`` when the
        folder cannot be loaded; the engine serves on."""
        ...

    async def load_weights(self, weights_dir: Path, policy_version: int) -> None:
        """Replace the live weights in place from a safetensors folder; only while paused.

        On failure raises ``EngineError``: the engine must then be rebuilt.
        """
        ...

    async def resume(self) -> None:
        """Go on with all requests under the present weights."""
        ...

    async def sleep(self) -> None:
        """Leave the device as far as this engine can (its docstring says how far).

        Pauses, as ``pause`` does. Requests stay, ``generate`` and ``abort`` work, KV may be lost
        and is then computed anew; ``load_weights`` works and counts. ``score``, ``read_back`` and
        ``resume`` have to wait for ``wake``. Nothing happens the second time.
        """
        ...

    async def wake(self) -> None:
        """Come back, paused, under the weights loaded last; nothing to do for one awake."""
        ...

    async def score(self, requests: Sequence[ScoreRequest]) -> list[npt.NDArray[np.float32]]:
        """Log-probs [T] of each request's ``token_ids`` under the live weights, T = 1, in order."""
        ...

    async def read_back(self) -> dict[str, str]:
        """Digest of each live parameter by HF name: xxh3_128 hex of its little-endian bytes."""
        ...
