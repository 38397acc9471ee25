"""Engine over transformers' continuous batching: light, in process, for CPU.

The model runs in the batching manager's own thread, one step at a time. That thread hands all
tokens of a step to ``Outbox`` in one go; the asyncio side takes everything that has gathered.
transformers has no public way to drop a request's KV cache, and KV of old weights falsifies the
log-probs under new ones; so a swap cancels each request and adds it again with all its tokens as
context. The manager has one seed: the order of batches changes the samples.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
)

from ringasync.errors import EngineError
from ringasync.records.weights import WeightManifest
from workers.engines import live_weights, paged_attention
from workers.engines.base import (
    GenerationRequest,
    SamplingParams,
    ScoreRequest,
    TokenChunk,
)
from workers.engines.outbox import LiveRequestState, Outbox

_ALIVE_CHECK_S = 0.5
_MANAGER_LOG = "ContinuousBatchingLogger"


@dataclass(frozen=True, slots=True)
class TransformersOptions:
    """Tuning of the batching manager; the defaults suit small models on CPU.

    ``page_size_tokens`` is the KV page, ``max_batch_tokens`` the most tokens of one step (prefill
    is cut to it), ``max_cached_tokens`` the KV cache; 0 means enough for every concurrent request.
    """

    page_size_tokens: int = 32
    max_batch_tokens: int = 1024
    max_cached_tokens: int = 0
    gather_ms: int = 50
    """How long tokens gather before ``outputs`` hands them out, unless a request ends."""
    attention: str = "padded"
    """``padded``: see ``paged_attention``. ``stock``: transformers' own, for comparison."""


class TransformersEngine:
    """Implements ``workers.engines.base.Engine``; float32, one device, one generation thread.

    ``gather_tokens`` of one request are handed out before ``gather_ms`` is over; 0: they wait.
    """

    checks_weights = False
    renews_kv = False

    def __init__(
        self,
        sampling: SamplingParams,
        *,
        max_concurrent: int,
        max_model_len_tokens: int,
        seed: int,
        keep_kv: bool = False,
        threads: int = 1,
        gather_tokens: int = 0,
        options: TransformersOptions | None = None,
    ) -> None:
        self._sampling = sampling
        self._max_concurrent = max_concurrent
        self._max_model_len_tokens = max_model_len_tokens
        self._seed = seed
        self._keep_kv = keep_kv
        self._threads = threads
        self._gather_tokens = gather_tokens
        self._options = options or TransformersOptions()
        self._ids = itertools.count()
        self._model: Any = None
        self._manager: Any = None
        self._outbox: Outbox | None = None
        self._dtypes: dict[str, torch.dtype] = {}
        self._prompt_tokens = 0
        self._asleep = False
        self._pause_scope: contextlib.AbstractContextManager[None] | None = None
        # The manager counts pauses by thread, so pause and resume must come from the same one.
        self._control = ThreadPoolExecutor(1, thread_name_prefix="engine-control")

    @property
    def prompt_tokens(self) -> tuple[int, int]:
        """See ``Engine.prompt_tokens``; there is no prefix cache."""
        return self._prompt_tokens, 0

    async def start(self, weights_dir: Path, policy_version: int) -> None:
        """See ``Engine.start``. Raises ``EngineError`` when the folder is no usable model."""
        if self._manager is not None:
            raise EngineError("the engine is running already")
        loop = asyncio.get_running_loop()
        eos = frozenset(self._sampling.eos_token_ids)
        self._outbox = Outbox(loop, policy_version, eos, self._gather_tokens)
        await self._in_control_thread(self._build, weights_dir)

    async def stop(self) -> None:
        """See ``Engine.stop``."""
        if self._manager is not None:
            await self._in_control_thread(self._tear_down)
        self._control.shutdown(wait=False)

    async def generate(self, requests: Sequence[GenerationRequest]) -> None:
        """See ``Engine.generate``. Raises ``ValueError`` for a request that could never run."""
        outbox, manager = self._require()
        for request in requests:
            context = len(request.prompt_ids) + len(request.prefix_ids)
            if not context or request.max_new_tokens < 1:
                raise ValueError(
                    f"request {request.request_id} has no context or nothing to sample"
                )
            if context + request.max_new_tokens > self._max_model_len_tokens:
                raise ValueError(
                    f"{request.request_id} needs {context + request.max_new_tokens} tokens, "
                    f"the window is {self._max_model_len_tokens}"
                )
        for request in requests:
            internal_id = f"{request.request_id}#{next(self._ids)}"
            outbox.add(request, internal_id)
            self._prompt_tokens += len(request.prompt_ids) + len(request.prefix_ids)
            self._submit(manager, internal_id, request, ())

    async def outputs(self) -> list[TokenChunk]:
        """See ``Engine.outputs``."""
        outbox, _ = self._require()
        while True:
            chunks = self.drain()
            if chunks:
                return chunks
            outbox.check()
            try:
                async with asyncio.timeout(_ALIVE_CHECK_S):
                    await outbox.filled.wait()
                # Waking for each step would cost the generation thread the interpreter's lock.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._options.gather_ms / 1000):
                        await outbox.urgent.wait()
            except TimeoutError:
                # Should the thread die without a word, nothing would ever set the event.
                _, manager = self._require()
                if not manager.is_running():
                    outbox.fail("it ended")

    def drain(self) -> list[TokenChunk]:
        """See ``Engine.drain``."""
        return self._outbox.drain() if self._outbox is not None else []

    async def abort(self, request_ids: Sequence[str]) -> None:
        """See ``Engine.abort``. What the step now running samples for them is dropped."""
        outbox, manager = self._require()
        for request_id in request_ids:
            internal_id = outbox.remove(request_id)
            if internal_id is not None:
                manager.cancel_request(internal_id)

    async def pause(self) -> None:
        """See ``Engine.pause``. Waits for at most one step."""
        if self._pause_scope is None:
            await self._in_control_thread(self._enter_pause)

    async def prepare(self, weights_dir: Path, manifest: WeightManifest | None = None) -> str:
        """See ``Engine.prepare``: a small model's files are read fast enough while paused."""
        return "file"

    async def load_weights(self, weights_dir: Path, policy_version: int) -> None:
        """See ``Engine.load_weights``."""
        if self._pause_scope is None:
            raise EngineError("load_weights needs a paused engine")
        await self._in_control_thread(self._load, weights_dir, policy_version)

    async def sleep(self) -> None:
        """See ``Engine.sleep``. It moves nothing: this engine runs on the CPU, where there is no
        device to leave. It only stands still."""
        await self.pause()
        self._asleep = True

    async def wake(self) -> None:
        """See ``Engine.wake``."""
        self._require()
        self._asleep = False

    async def resume(self) -> None:
        """See ``Engine.resume``."""
        self._require_awake()
        if self._pause_scope is not None:
            await self._in_control_thread(self._leave_pause)

    async def score(self, requests: Sequence[ScoreRequest]) -> list[npt.NDArray[np.float32]]:
        """See ``Engine.score``. One padded forward in another thread, beside generation."""
        self._require_awake()
        if not requests:
            return []
        return await asyncio.to_thread(self._score, list(requests))

    async def read_back(self) -> dict[str, str]:
        """See ``Engine.read_back``. Digests are taken in the dtype the weights were stored in."""
        self._require_awake()
        return await asyncio.to_thread(self._digests)

    # What follows runs in the control thread, the manager's thread or a worker thread.

    def _build(self, weights_dir: Path) -> None:
        torch.set_num_threads(self._threads)
        _tame_logs()
        self._dtypes = live_weights.stored_dtypes(weights_dir)
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                weights_dir,
                dtype=torch.float32,
                attn_implementation="sdpa",
                local_files_only=True,
                output_loading_info=True,
            )
        except Exception as error:  # transformers raises nearly anything on a broken folder
            raise EngineError(
                f"{weights_dir} is no model transformers can load: {error}"
            ) from error
        if info["missing_keys"]:
            raise EngineError(f"{weights_dir} lacks {sorted(info['missing_keys'])[:3]}")
        self._model = model.eval().requires_grad_(False)
        self._manager = self._new_manager(model)
        self._manager.output_router = self._outbox
        self._manager.start()

    def _new_manager(self, model: Any) -> Any:
        options, page = self._options, self._options.page_size_tokens
        pages = -(-self._max_model_len_tokens // page) * self._max_concurrent
        if options.max_cached_tokens:
            pages = max(1, options.max_cached_tokens // page)
        manager = model.init_continuous_batching(
            generation_config=GenerationConfig(
                do_sample=True,
                temperature=self._sampling.temperature,
                top_p=1.0,
                top_k=0,
                max_new_tokens=self._max_model_len_tokens,
                eos_token_id=list(self._sampling.eos_token_ids) or -1,
                pad_token_id=0,
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=page,
                num_blocks=pages + 2,
                max_batch_tokens=max(options.max_batch_tokens, self._max_concurrent),
                max_requests_per_batch=self._max_concurrent,
                safety_margin=0.0,
                # Shared prefix blocks would carry KV of old weights over a swap.
                allow_block_sharing=False,
                return_logprobs=True,
                seed=self._seed,
                use_cuda_graph=False,
                use_async_batching=False,
                auto_switch_to_flash=False,
            ),
        )
        if options.attention == "padded":
            # After the manager was made (it knows three names only), before its thread starts.
            model.set_attn_implementation(paged_attention.register())
        return manager

    def _tear_down(self) -> None:
        manager, self._manager = self._manager, None
        self._leave_pause()
        if manager.is_running():
            manager.stop(block=True, hard_stop=True)
        manager.destroy()
        self._model = None

    def _enter_pause(self) -> None:
        _, manager = self._require()
        scope = manager.pause()
        try:
            scope.__enter__()
        except RuntimeError as error:
            raise EngineError(f"cannot pause: {error}") from error
        self._pause_scope = scope

    def _leave_pause(self) -> None:
        scope, self._pause_scope = self._pause_scope, None
        if scope is not None:
            scope.__exit__(None, None, None)

    def _load(self, weights_dir: Path, policy_version: int) -> None:
        outbox, manager = self._require()
        dtypes = live_weights.stored_dtypes(weights_dir)
        live_weights.copy_into(self._model.state_dict(), weights_dir)
        self._dtypes = dtypes
        outbox.relabel(policy_version)
        if not self._keep_kv:
            self._readd_all(outbox, manager)

    def _readd_all(self, outbox: Outbox, manager: Any) -> None:
        """Have every KV computed anew: cancel each request, add it with its tokens as context."""
        processor = manager.batch_processor
        for running in list(outbox.running.values()):
            # Marking the scheduler at once, not through the queue, spares a step on stale KV. The
            # manager is parked, and takes what it had read from its queue before it looks at marks.
            if processor is not None:
                processor.scheduler.set_request_cancellation(running.internal_id)
            else:
                manager.cancel_request(running.internal_id)
            internal_id = f"{running.request.request_id}#{next(self._ids)}"
            outbox.rename(running, internal_id)
            self._submit(manager, internal_id, running.request, tuple(running.generated))

    def _submit(
        self, manager: Any, internal_id: str, request: GenerationRequest, done: tuple[int, ...]
    ) -> None:
        refusal = manager.background_thread_status.can_accept_new_requests()
        if refusal is not None:
            raise EngineError(f"no requests are taken any more: {refusal}")
        # What manager.add_request does, with our own state.
        manager.input_queue.put(
            LiveRequestState(
                request_id=internal_id,
                initial_tokens=[*request.prompt_ids, *request.prefix_ids, *done],
                max_new_tokens=request.max_new_tokens - len(done),
                streaming=True,
                eos_token_id=list(self._sampling.eos_token_ids) or -1,
            )
        )
        manager._wake_up_loop.set()

    @torch.no_grad()
    def _score(self, requests: list[ScoreRequest]) -> list[npt.NDArray[np.float32]]:
        rows = [[*request.prompt_ids, *request.token_ids] for request in requests]
        width = max(len(row) for row in rows)
        # Padding on the right changes nothing to its left under causal attention.
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        logprobs = self._model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        picked = logprobs[:, :-1].gather(2, ids[:, 1:, None])[:, :, 0].numpy()
        return [
            picked[i, len(request.prompt_ids) - 1 : len(row) - 1].astype(np.float32)
            for i, (request, row) in enumerate(zip(requests, rows, strict=True))
        ]

    def _digests(self) -> dict[str, str]:
        live = self._model.state_dict()
        return {
            name: live_weights.digest(live[name], dtype) for name, dtype in self._dtypes.items()
        }

    def _require(self) -> tuple[Outbox, Any]:
        if self._manager is None or self._outbox is None:
            raise EngineError("the engine is not running")
        return self._outbox, self._manager

    def _require_awake(self) -> None:
        self._require()
        if self._asleep:
            raise EngineError("the engine is asleep: wake it first")

    async def _in_control_thread(self, function: Any, *args: Any) -> None:
        await asyncio.get_running_loop().run_in_executor(self._control, function, *args)


def _tame_logs() -> None:
    """No progress bars, and the manager's log goes where ours go, from warnings upwards."""
    transformers.utils.logging.disable_progress_bar()
    logger = logging.getLogger(_MANAGER_LOG)
    logger.handlers.clear()
    logger.propagate = True
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.WARNING)
