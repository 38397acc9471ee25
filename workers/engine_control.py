"""The one place that calls the engine: pauses for several reasons, swaps, tokens as they come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ringasync.errors import EngineError
from ringasync.observability.log import get_logger
from ringasync.records.weights import WeightManifest
from workers.engines.base import Engine, GenerationRequest, ScoreRequest, TokenChunk
from workers.kv_renewal import KvRenewal

OnTokens = Callable[[Sequence[TokenChunk]], None]
MakeEngine = Callable[[Path], Engine]
"""Makes an unstarted engine for a weights folder (which says what EOS is)."""

DEVICE = "the learner has the device"
"""Reason to hold the engine while a shared device is the learner's."""

WAVE_TOKENS = 4096
"""Context that is computed anew beside one step of generation, see ``kv_renewal``: the more, the
sooner all is renewed and the longer everybody waits for a token meanwhile."""

log = get_logger()


class EngineControl:
    """An engine with a pump for its tokens.

    Calls are serialised, as the protocol wants. The engine steps only while nobody holds it:
    ``hold`` and ``release`` take a reason, and the last reason to go resumes. ``failed`` is set
    when the engine died; ``changed`` is set then too.
    """

    def __init__(
        self,
        make: MakeEngine,
        on_tokens: OnTokens,
        changed: asyncio.Event,
        wave_tokens: int = WAVE_TOKENS,
    ) -> None:
        self._make = make
        self._on_tokens = on_tokens
        self._changed = changed
        self._lock = asyncio.Lock()
        self._reasons: set[str] = set()
        self._engine: Engine | None = None
        self._asleep = False
        self._pump_task: asyncio.Task[None] | None = None
        self._wave_tokens = wave_tokens
        self._renewal = KvRenewal()
        self._renew_task: asyncio.Task[None] | None = None
        self._steps = asyncio.Event()
        self._steps.set()
        self.failed: EngineError | None = None

    @property
    def is_running(self) -> bool:
        """Whether there is an engine that is not known to be dead."""
        return self._engine is not None and self.failed is None

    @property
    def held_by(self) -> str:
        """Why the engine is paused, for people; empty while it steps."""
        return ", ".join(sorted(self._reasons))

    @property
    def figures(self) -> dict[str, int]:
        """What ``top`` shows of the present engine; see ``Engine.prompt_tokens``."""
        total, cached = self._engine.prompt_tokens if self._engine is not None else (0, 0)
        return {"prompt_tokens": total, "cached_prompt_tokens": cached}

    async def start(self, weights_dir: Path, policy_version: int) -> None:
        """Make an engine, held again for every reason that stands. Raises ``EngineError``."""
        async with self._lock:
            self.failed = None
            engine = self._make(weights_dir)
            self._engine = engine
            await engine.start(weights_dir, policy_version)
            if self._reasons:
                await engine.pause()
            self._pump_task = asyncio.create_task(self._pump(engine), name="engine-pump")

    async def stop(self) -> None:
        """End the engine, dead or alive; ``failed`` told of this one and is cleared."""
        async with self._lock:
            tasks = [task for task in (self._pump_task, self._renew_task) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._pump_task = self._renew_task = None
            self._renewal.clear()
            engine, self._engine = self._engine, None
            self._asleep = False
            if engine is not None:
                await engine.stop()
            self.failed = None

    async def hold(self, reason: str) -> None:
        """Pause; all tokens sampled so far have been handed on when this returns."""
        async with self._lock:
            try:
                if not self._reasons and self.is_running:
                    await self._alive().pause()
            finally:
                # A dead engine stands still too, and what it had sampled counts.
                self._reasons.add(reason)
                self._steps.clear()
                if self._engine is not None:
                    self._hand_on(self._engine.drain())

    async def release(self, reason: str) -> None:
        """Withdraw a reason; resumes when none is left."""
        async with self._lock:
            if reason in self._reasons:
                self._reasons.discard(reason)
                if not self._reasons and self.is_running:
                    await self._alive().resume()
            if not self._reasons:
                self._steps.set()

    async def sleep(self, reason: str) -> None:
        """Hold, and have the engine leave its device; a dead one is stopped, which frees it too.

        ``failed`` stays, so that a dead engine is rebuilt once the device is there again.
        """
        await self.hold(reason)
        async with self._lock:
            if self._engine is None or self._asleep:
                return
            if self.failed is not None:
                await self._engine.stop()
            else:
                await self._engine.sleep()
                self._asleep = True

    async def wake(self, reason: str) -> None:
        """The engine's device is there again: wake it and withdraw the reason to hold."""
        async with self._lock:
            if self._asleep:
                await self._alive().wake()
                self._asleep = False
        await self.release(reason)

    async def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Generate these."""
        async with self._lock:
            engine = self._alive()
            await engine.generate(requests)
            if engine.renews_kv:
                self._renewal.submitted(requests)

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Stop these; a dead engine has stopped them already.

        What they had sampled has been handed on when this returns, so that none of it is taken
        for the tokens of a later request with the same id.
        """
        async with self._lock:
            if request_ids and self.is_running:
                engine = self._alive()
                await engine.abort(request_ids)
                self._hand_on(engine.drain())
                self._renewal.gone(request_ids)

    @property
    def checks_weights(self) -> bool:
        """See ``Engine.checks_weights``; False without an engine."""
        return self._engine is not None and self._engine.checks_weights

    async def prepare(self, weights_dir: Path, manifest: WeightManifest | None = None) -> str:
        """See ``Engine.prepare``; other calls go on meanwhile."""
        return await self._alive().prepare(weights_dir, manifest)

    async def load(self, weights_dir: Path, policy_version: int) -> None:
        """Swap weights; the caller holds the engine."""
        async with self._lock:
            engine = self._alive()
            await engine.load_weights(weights_dir, policy_version)
            if engine.renews_kv:
                self._renewal.swapped()
                if self._renew_task is None or self._renew_task.done():
                    self._renew_task = asyncio.create_task(self._renew(engine), name="renew-kv")

    async def score(self, requests: Sequence[ScoreRequest]) -> list[npt.NDArray[np.float32]]:
        """See ``Engine.score``."""
        async with self._lock:
            return await self._alive().score(requests)

    async def read_back(self) -> dict[str, str]:
        """See ``Engine.read_back``."""
        async with self._lock:
            return await self._alive().read_back()

    def fail(self, error: EngineError) -> None:
        """Note that the engine is dead."""
        if self.failed is None:
            log.error("engine failed", error=str(error))
            self.failed = error
        self._changed.set()

    async def _pump(self, engine: Engine) -> None:
        """Consumes: the engine's outputs. Produces: calls of ``on_tokens``. Ended by ``stop``."""
        try:
            while True:
                self._hand_on(await engine.outputs())
        except EngineError as error:
            self.fail(error)

    async def _renew(self, engine: Engine) -> None:
        """Consumes: requests whose KV is of older weights, until none is due. Produces: the same
        requests, submitted again. Waits for: an engine that steps, and a token of each request of
        the wave before. Ended by ``stop``; another swap only makes all of them due again."""
        try:
            while self._renewal.due:
                await self._steps.wait()
                async with self._lock:
                    if self._reasons:
                        continue
                    wave = self._renewal.wave(self._wave_tokens)
                    await engine.abort(wave)
                    self._hand_on(engine.drain())
                    requests = self._renewal.renewed(wave)
                    await engine.generate(requests)
                    self._renewal.submitted(requests)
                await self._renewal.settled.wait()
        except EngineError as error:
            self.fail(error)

    def _hand_on(self, chunks: Sequence[TokenChunk]) -> None:
        self._renewal.absorb(chunks)
        if chunks:
            self._on_tokens(chunks)

    def _alive(self) -> Engine:
        if self._engine is None or self.failed is not None:
            raise EngineError(str(self.failed or "there is no engine"))
        return self._engine
