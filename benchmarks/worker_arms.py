"""The two things the worker benchmark compares: an engine by itself, and the worker around it.

Both drive the same started engine through a meter, so that tokens and seconds are counted alike.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ringasync.broker.client import Broker
from ringasync.broker.types import NewGroup, VersionInfo
from ringasync.config.schema import Config
from ringasync.observability.exporter import exporting
from ringasync.records.weights import WeightManifest
from ringasync.runtime.shutdown import Shutdown
from ringasync.weights.build import make_transport
from ringasync.weights.manifest import VersionFields, dump_manifest
from workers.engines.base import Engine, GenerationRequest, ScoreRequest, TokenChunk
from workers.intake import ModelLimits
from workers.rollout_loop import RolloutWorker

_POLICY_VERSION = 1
_HOUR_MS = 3_600_000
_ROUND_TIMEOUT_S = 300.0
_SETTLE_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Speed:
    """CPU is of this process, all threads: it says more than time on a busy machine."""

    tokens_per_s: float
    cpu_us_per_token: float


class Meter:
    """An engine that is lent out: it counts tokens, and starting or stopping it does nothing.

    Time runs from the first ``generate`` to the last token handed out.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.reset()

    def reset(self) -> None:
        """Begin a new measurement."""
        self.tokens = self.finished = 0
        self._first: tuple[float, float] | None = None
        self._last = (0.0, 0.0)

    def speed(self) -> Speed:
        """What this measurement found. Raises ``ValueError`` before the first token."""
        if self._first is None or self._last <= self._first:
            raise ValueError("nothing was generated")
        wall_s, cpu_s = (last - first for last, first in zip(self._last, self._first, strict=True))
        return Speed(self.tokens / wall_s, cpu_s / self.tokens * 1e6)

    def _count(self, chunks: list[TokenChunk]) -> list[TokenChunk]:
        self.tokens += sum(len(chunk.token_ids) for chunk in chunks)
        self.finished += sum(chunk.finish is not None for chunk in chunks)
        if chunks:
            self._last = _clocks()
        return chunks

    @property
    def prompt_tokens(self) -> tuple[int, int]:
        """See ``Engine.prompt_tokens``."""
        return self._engine.prompt_tokens

    async def start(self, weights_dir: Path, policy_version: int) -> None:
        """Nothing: the engine runs already, with the same weights."""

    async def stop(self) -> None:
        """Nothing: the next round needs it."""

    async def generate(self, requests: Sequence[GenerationRequest]) -> None:
        """See ``Engine.generate``."""
        if self._first is None and requests:
            self._first = _clocks()
        await self._engine.generate(requests)

    async def outputs(self) -> list[TokenChunk]:
        """See ``Engine.outputs``."""
        return self._count(await self._engine.outputs())

    def drain(self) -> list[TokenChunk]:
        """See ``Engine.drain``."""
        return self._count(self._engine.drain())

    async def abort(self, request_ids: Sequence[str]) -> None:
        """See ``Engine.abort``."""
        await self._engine.abort(request_ids)

    async def pause(self) -> None:
        """See ``Engine.pause``."""
        await self._engine.pause()

    @property
    def checks_weights(self) -> bool:
        """See ``Engine.checks_weights``."""
        return self._engine.checks_weights

    @property
    def renews_kv(self) -> bool:
        """See ``Engine.renews_kv``."""
        return self._engine.renews_kv

    async def sleep(self) -> None:
        """See ``Engine.sleep``."""
        await self._engine.sleep()

    async def wake(self) -> None:
        """See ``Engine.wake``."""
        await self._engine.wake()

    async def prepare(self, weights_dir: Path, manifest: WeightManifest | None = None) -> str:
        """See ``Engine.prepare``."""
        return await self._engine.prepare(weights_dir, manifest)

    async def load_weights(self, weights_dir: Path, policy_version: int) -> None:
        """See ``Engine.load_weights``."""
        await self._engine.load_weights(weights_dir, policy_version)

    async def resume(self) -> None:
        """See ``Engine.resume``."""
        await self._engine.resume()

    async def score(self, requests: Sequence[ScoreRequest]) -> list[npt.NDArray[np.float32]]:
        """See ``Engine.score``."""
        return await self._engine.score(requests)

    async def read_back(self) -> dict[str, str]:
        """See ``Engine.read_back``."""
        return await self._engine.read_back()


async def bare_round(meter: Meter, groups: Sequence[NewGroup]) -> Speed:
    """All rollouts of ``groups`` by the engine alone, output read and dropped."""
    requests = [
        GenerationRequest(f"{g.group_id}.{i}", g.prompt_ids, (), g.max_new_tokens, i)
        for g in groups
        for i in range(g.size)
    ]
    meter.reset()
    async with asyncio.timeout(_ROUND_TIMEOUT_S):
        await meter.generate(requests)
        while meter.finished < len(requests):
            await meter.outputs()
    _check(meter, groups)
    return meter.speed()


class WorkerRounds:
    """Rounds of the real worker: a new run in a real Redis each time, fed before the worker."""

    def __init__(self, config: Config, url: str, weights_dir: Path, limits: ModelLimits) -> None:
        self._config, self._url = config, url
        self._weights_dir, self._limits = weights_dir, limits
        self._rounds = itertools.count(1)

    async def round(self, meter: Meter, groups: Sequence[NewGroup], metrics_port: int = 0) -> Speed:
        """All rollouts of ``groups`` by the worker, which serves metrics if a port is given."""
        run = self._config.run.model_copy(update={"name": f"bench-{next(self._rounds)}"})
        metrics = self._config.metrics.model_copy(update={"port": metrics_port})
        config = self._config.model_copy(update={"run": run, "metrics": metrics})
        broker = await Broker.connect(self._url, run.name)
        try:
            await broker.create_run("", "bench", config.schedule.mode)
            fence = await broker.acquire_lock("coordinator", "bench", _HOUR_MS)
            await broker.feed(fence, "feed", groups, "")
            await self._publish(broker, config)
            await self._work(broker, config, meter, sum(group.size for group in groups))
            _check(meter, groups)
            await broker.delete_run()
        finally:
            await broker.close()
        return meter.speed()

    async def _publish(self, broker: Broker, config: Config) -> None:
        transport = make_transport(config, broker)
        fence = await broker.acquire_lock("learner", "bench", _HOUR_MS)
        fields = VersionFields(config.run.name, _POLICY_VERSION, 0, 0, fence.token)
        manifest = await transport.publish(self._weights_dir, fields)
        await broker.publish(fence, VersionInfo(_POLICY_VERSION, 0, 0, dump_manifest(manifest)))
        await transport.close()

    async def _work(self, broker: Broker, config: Config, meter: Meter, rollouts: int) -> None:
        shutdown = Shutdown()
        transport = make_transport(config, broker)
        worker = RolloutWorker(
            config,
            broker,
            transport,
            lambda _: meter,
            lambda _: self._limits,
            shutdown,
            worker_id="bench",
            scratch_dir=config.run_dir / "scratch",
        )
        meter.reset()
        try:
            async with (
                exporting(config, "worker", "bench") as exporter,
                asyncio.timeout(_ROUND_TIMEOUT_S),
                asyncio.TaskGroup() as tasks,
            ):
                worker.session.listen(exporter.set)
                running = tasks.create_task(worker.run())
                while worker.flusher.finished < rollouts and not running.done():
                    await asyncio.wait([running], timeout=_SETTLE_POLL_S)
                shutdown.request("the benchmark is over")
        finally:
            await transport.close()
        accepted = (await broker.ledger()).get("accepted", 0)
        assert accepted == meter.tokens, f"Redis holds {accepted} of {meter.tokens} tokens"


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _check(meter: Meter, groups: Sequence[NewGroup]) -> None:
    """Without an end-of-text token every rollout has exactly its length, in both arms."""
    expected = sum(group.size * group.max_new_tokens for group in groups)
    assert meter.tokens == expected, f"{meter.tokens} tokens were generated, not {expected}"
