"""Engine over vLLM's AsyncLLM: the front end in this process, EngineCore in a child.

Generation is AsyncLLM's, but tokens are taken by ``TokenSink`` in one go for each step. A swap has
two parts: while generation goes on, the workers read the next weights (``_stage``); then, paused,
they only copy them into the live model. ``pause`` keeps requests and KV; ``load_weights`` drops the
KV, so that requests in flight are computed anew under the new weights, unless ``kv`` is another.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from ringasync.errors import EngineError
from ringasync.observability.log import get_logger
from ringasync.records.weights import WeightManifest
from ringasync.weights.manifest import dump_manifest
from workers.engines.base import (
    GenerationRequest,
    SamplingParams,
    ScoreRequest,
    TokenChunk,
)
from workers.engines.vllm import arguments, compat, packing, plugin
from workers.engines.vllm.nap import Nap
from workers.engines.vllm.options import VllmOptions
from workers.engines.vllm.stage_wait import merged_digests, until_staged
from workers.engines.vllm.token_sink import TokenSink

_ALIVE_CHECK_S = 1.0
T = TypeVar("T")
Kv = Literal["recompute", "keep", "rolling"]

log = get_logger()


class VllmEngine:
    """Implements ``workers.engines.base.Engine``. One engine a process at a time is meant."""

    checks_weights = True

    def __init__(
        self,
        sampling: SamplingParams,
        *,
        max_concurrent: int,
        max_model_len_tokens: int,
        seed: int,
        dtype: str = "float32",
        fp32_head: bool = False,
        kv: Kv = "recompute",
        gather_tokens: int = 0,
        routed_experts: bool = False,
        colocated: bool = False,
        options: VllmOptions | None = None,
    ) -> None:
        self._sampling = sampling
        self._max_concurrent = max_concurrent
        self._max_model_len_tokens = max_model_len_tokens
        self._seed = seed
        self._dtype = dtype
        self._fp32_head = fp32_head
        self._kv, self.renews_kv = kv, kv == "rolling"
        self._gather_tokens = gather_tokens
        self._routed_experts = routed_experts
        self._options = options or VllmOptions()
        self._engine: Any = None
        self._sink: TokenSink | None = None
        self._stop_ids: list[int] = []
        self._paused = False
        self._colocated = colocated
        self._nap = Nap(self._options.sleep_level)
        self._scores = itertools.count()
        self.last_swap_s: dict[str, float] = {}
        """Seconds of the parts of the last swap: ``stage``, ``load``, ``kv``."""
        self.last_way = "file"
        """How the last staged weights came to all ranks: ``file``, ``socket`` or ``nccl``."""

    async def start(self, weights_dir: Path, policy_version: int) -> None:
        """See ``Engine.start``. Raises ``EngineError`` when vLLM cannot serve the folder."""
        if self._engine is not None:
            raise EngineError("the engine is running already")
        self._nap = Nap(
            self._options.sleep_level, frees_memory=self._colocated and not compat.is_cpu()
        )
        sink = TokenSink(policy_version, self._gather_tokens)
        build = asyncio.to_thread(self._build, weights_dir, sink)
        try:
            async with asyncio.timeout(self._options.start_timeout_s):
                self._engine = await build
        except TimeoutError:
            raise EngineError(
                f"vLLM did not start within {self._options.start_timeout_s} s"
            ) from None
        self._sink = sink
        if self._routed_experts:
            sink.routed_shape = compat.routed_shape(self._engine.model_config)
        vocabulary = self._engine.model_config.get_vocab_size()
        self._stop_ids = [token for token in self._sampling.eos_token_ids if token < vocabulary]
        # Built outside the loop, it did not begin to listen; a dead EngineCore must be heard.
        self._engine._run_output_handler()
        try:
            await compat.label_weights(self._engine, policy_version)
            await self._stage(weights_dir)
        except EngineError:
            await self.stop()
            raise
        self._nap.note_loaded(weights_dir, policy_version)

    async def stop(self) -> None:
        """See ``Engine.stop``."""
        engine, self._engine = self._engine, None
        if self._sink is not None:
            self._sink.fail("the engine is not running")
        if engine is not None:
            await compat.close(engine)

    async def generate(self, requests: Sequence[GenerationRequest]) -> None:
        """See ``Engine.generate``. Raises ``ValueError`` for a request that could never run."""
        sink, engine = self._require()
        for request in requests:
            arguments.check_request(request, self._max_model_len_tokens)
            if sink.is_running(request.request_id):
                raise ValueError(f"request {request.request_id} is running already")
        for request in requests:
            await self._answer(
                engine.add_request(
                    request.request_id,
                    arguments.prompt(request, sink.policy_version if self.renews_kv else None),
                    arguments.sampling_params(
                        request,
                        self._sampling.temperature,
                        self._stop_ids,
                        self._seed if self._options.seeded_requests else None,
                        routed_experts=self._routed_experts,
                    ),
                )
            )

    async def outputs(self) -> list[TokenChunk]:
        """See ``Engine.outputs``."""
        sink, _ = self._require()
        while True:
            chunks = self.drain()
            if chunks:
                return chunks
            if sink.error is not None:
                raise EngineError(sink.error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ALIVE_CHECK_S):
                    await sink.filled.wait()
                # Handing out each step's tokens by themselves would cost the interpreter more.
                async with asyncio.timeout(self._options.gather_ms / 1000):
                    await sink.urgent.wait()
            if self._engine is None or self._engine.errored:
                sink.fail("vLLM's EngineCore is dead; its own log says why")

    def drain(self) -> list[TokenChunk]:
        """See ``Engine.drain``."""
        return self._sink.drain() if self._sink is not None else []

    async def abort(self, request_ids: Sequence[str]) -> None:
        """See ``Engine.abort``. What the step now running samples for them is dropped."""
        _, engine = self._require()
        if request_ids:
            await self._answer(engine.abort(list(request_ids)))

    async def pause(self) -> None:
        """See ``Engine.pause``: requests and KV stay. Waits for at most the step under way."""
        sink, engine = self._require()
        if not self._paused:
            # Not pause_generation: it sleeps 20 ms in the hope that all outputs have come.
            await self._answer(
                engine.engine_core.pause_scheduler_async(mode="keep", clear_cache=False)
            )
            await self._answer(self._all_taken(sink, engine))
            self._paused = True

    async def load_weights(self, weights_dir: Path, policy_version: int) -> None:
        """See ``Engine.load_weights``. Reads the files first, if ``prepare`` was not called."""
        sink, engine = self._require()
        if not self._paused:
            raise EngineError("load_weights needs a paused engine")
        await self._stage(weights_dir)  # nothing to do when ``prepare`` was called
        began_s = time.perf_counter()
        await self._answer(self._nap.wake_weights(engine))
        update = {"weights_dir": str(weights_dir), "load": self._options.load}
        try:
            await self._answer(engine.start_weight_update())
            await self._answer(engine.update_weights(compat.update_request(update)))
            await self._answer(compat.finish_weight_update(engine, policy_version))
        except EngineError as error:
            # Part of the model may be on the meta device now: nobody must step it.
            sink.fail(f"a swap broke in the middle: {error}")
            raise
        loaded_s = time.perf_counter()
        if self._kv == "recompute":
            await self._answer(engine.reset_prefix_cache(reset_running_requests=True))
        sink.relabel(policy_version)
        self._nap.note_loaded(weights_dir, policy_version)
        self.last_swap_s["load"] = loaded_s - began_s
        self.last_swap_s["kv"] = time.perf_counter() - loaded_s

    async def resume(self) -> None:
        """See ``Engine.resume``."""
        _, engine = self._require_awake()
        if self._paused:
            await self._answer(engine.resume_generation())
            self._paused = False

    async def sleep(self) -> None:
        """See ``Engine.sleep``. Made with ``colocated``, weights and KV cache leave a GPU (see
        ``VllmOptions.sleep_level``). A CPU has no such mode: only requests' KV blocks go."""
        _, engine = self._require()
        if self._nap.is_asleep:
            return
        await self.pause()
        await self._answer(engine.reset_prefix_cache(reset_running_requests=True))
        await self._answer(self._nap.fall_asleep(engine))

    async def wake(self) -> None:
        """See ``Engine.wake``. Weights that were let go and not replaced are loaded once more."""
        _, engine = self._require()
        if self._nap.are_weights_gone and self._nap.loaded is not None:
            await self.load_weights(*self._nap.loaded)
        await self._answer(self._nap.wake_up(engine))

    async def prepare(self, weights_dir: Path, manifest: WeightManifest | None = None) -> str:
        """See ``Engine.prepare``: the workers pull from the learner, or read the files."""
        _, engine = self._require()
        began_s = time.perf_counter()
        await self._stage(weights_dir, manifest)
        self.last_swap_s["stage"] = time.perf_counter() - began_s
        ranks = await self._answer(engine.collective_rpc("ring_stage_way"))
        ways = {way for way, _ in ranks}
        self.last_way = ways.pop() if len(ways) == 1 else "file"
        for why in {why for _, why in ranks if why}:
            log.warning("weights were not pulled but read from files", why=why)
        return self.last_way

    async def score(self, requests: Sequence[ScoreRequest]) -> list[npt.NDArray[np.float32]]:
        """See ``Engine.score``. vLLM scores between the steps of generation, so an engine that is
        paused steps until it is done: what is sampled meanwhile is of the live weights."""
        sink, engine = self._require_awake()
        if not requests:
            return []
        was_paused = self._paused
        if was_paused:
            await self.resume()
        try:
            loop = asyncio.get_running_loop()
            names = [f"score-{next(self._scores)}" for _ in requests]
            waiting = []
            for name, request in zip(names, requests, strict=True):
                waiting.append(sink.want_score(name, len(request.prompt_ids) - 1, loop))
                await self._answer(
                    engine.add_request(
                        name,
                        {"prompt_token_ids": [*request.prompt_ids, *request.token_ids]},
                        arguments.scoring_params(),
                        priority=-1,
                    )
                )
            return list(await self._answer(_all_scores(waiting)))
        finally:
            if was_paused and sink.error is None and self._engine is not None:
                await self.pause()

    async def read_back(self) -> dict[str, str]:
        """See ``Engine.read_back``. Every rank compares its live parameters with the slices of the
        loaded folder that it should hold; the digest of a tensor that is equal on all of them is
        the file's, of any other it says which rank differs and how."""
        _, engine = self._require_awake()
        await self._restage(engine)
        ranks = await self._answer(engine.collective_rpc("ring_read_back"))
        return merged_digests(ranks)

    @property
    def prompt_tokens(self) -> tuple[int, int]:
        """See ``Engine.prompt_tokens``; vLLM says it of each prefill."""
        sink = self._sink
        return (sink.prompt_tokens, sink.cached_prompt_tokens) if sink is not None else (0, 0)

    # Staging.

    async def _stage(self, weights_dir: Path, manifest: WeightManifest | None = None) -> None:
        _, engine = self._require()
        told, pull_s = "", 0.0
        if manifest is not None:
            told = dump_manifest(manifest.model_copy(update={"probe": ()}))
            pull_s = manifest.peer.timeout_s if manifest.peer is not None else 0.0
        # A shared device has no room for a second copy beside live weights and KV.
        where = "host" if self._nap.frees_memory else self._options.staging
        args = (str(weights_dir), where, told)
        await self._answer(engine.collective_rpc("ring_stage", args=args))
        await self._staged(engine, pull_s)

    async def _restage(self, engine: Any) -> None:
        """The tensors to compare with may have been let go."""
        await self._answer(engine.collective_rpc("ring_restage"))
        await self._staged(engine)

    async def _staged(self, engine: Any, pull_s: float = 0.0) -> None:
        await until_staged(
            lambda: self._answer(engine.collective_rpc("ring_stage_state")),
            self._options.stage_timeout_s,
            pull_s,
        )

    # What follows runs in another thread.

    def _build(self, weights_dir: Path, sink: TokenSink) -> Any:
        os.environ[plugin.OWNER_VARIABLE] = str(os.getpid())
        plugin.register()
        from vllm.engine.arg_utils import AsyncEngineArgs

        from workers.engines.vllm.async_llm import make_async_llm

        try:
            wanted = compat.known_engine_args(self._arguments(weights_dir))
            with packing.asked_for(self._options.pack_logprobs):
                return make_async_llm(AsyncEngineArgs(**wanted), sink)
        except Exception as error:  # vLLM raises nearly anything on a folder it cannot load
            why = arguments.refusal(weights_dir, error, routed_experts=self._routed_experts)
            raise EngineError(why) from error

    def _arguments(self, weights_dir: Path) -> dict[str, Any]:
        return arguments.engine_arguments(
            weights_dir,
            self._options,
            max_model_len_tokens=self._max_model_len_tokens,
            max_concurrent=self._max_concurrent,
            dtype=self._dtype,
            seed=self._seed,
            fp32_head=self._fp32_head,
            routed_experts=self._routed_experts,
            sleep_mode=self._nap.frees_memory,
        )

    # Helpers.

    async def _all_taken(self, sink: TokenSink, engine: Any) -> None:
        """Wait until the sink has met everything that EngineCore has sent so far."""
        from vllm.v1.engine import EngineCoreOutputs

        marker, reached = sink.barrier()
        engine.engine_core.outputs_queue.put_nowait(EngineCoreOutputs(scheduler_stats=marker))
        await reached.wait()

    async def _answer(self, call: Awaitable[T]) -> T:
        """A call's result; ``EngineError`` when vLLM fails, is dead, or does not answer."""
        try:
            async with asyncio.timeout(self._options.swap_timeout_s):
                return await call
        except EngineError:
            raise
        except TimeoutError:
            raise EngineError(
                f"vLLM did not answer within {self._options.swap_timeout_s} s"
            ) from None
        except asyncio.CancelledError:
            if self._sink is not None and self._sink.error is not None:
                raise EngineError(self._sink.error) from None
            raise
        except Exception as error:
            dead = self._engine is None or self._engine.errored
            why = "vLLM's EngineCore is dead" if dead else "vLLM refused"
            if dead and self._sink is not None:
                self._sink.fail(why)
            raise EngineError(f"{why}: {error}") from error

    def _require(self) -> tuple[TokenSink, Any]:
        if self._engine is None or self._sink is None:
            raise EngineError("the engine is not running")
        if self._sink.error is not None:
            raise EngineError(self._sink.error)
        return self._sink, self._engine

    def _require_awake(self) -> tuple[TokenSink, Any]:
        if self._nap.is_asleep:
            raise EngineError("the engine is asleep: wake it first")
        return self._require()


async def _all_scores(
    waiting: Sequence[asyncio.Future[npt.NDArray[np.float32]]],
) -> list[npt.NDArray[np.float32]]:
    return [await one for one in waiting]
