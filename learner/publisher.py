"""Publish the present weights as the next policy version, with a canary probe.

::

    loop: step -> copy the weights, score the probe -> next batch ...
    beside it:     write the folder, keep an export, hand it to the transport -> announce it

consumes       the backend's weights of the moment of writing
produces       published versions, each announced after it is whole, one after the other
waits for      the announcement of the version before, before the next folder is written
unblocked by   the transport, the broker
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import structlog

from learner.backends.base import Backend, ScoredSequence
from learner.batch import TrainBatch
from learner.version_exports import VersionExports
from learner.worker_thread import TorchThread
from ringasync.broker.client import Broker
from ringasync.broker.types import Fence, VersionInfo
from ringasync.config.schema import Config
from ringasync.records.trajectory import Trajectory
from ringasync.records.weights import ProbeSequence, WeightManifest
from ringasync.runtime import crashpoints
from ringasync.weights.manifest import VersionFields, dump_manifest
from ringasync.weights.transport import Transport

_PROBE_TOKENS = 64
"""Tokens scored of each probe sequence: enough to tell weights apart, cheap for every worker."""
_SAMPLED_TOKENS = 32
_LEAVING_S = 5.0


@dataclass(frozen=True, slots=True)
class Publication:
    """What is published: the weights after ``step`` batches; ``fork_step`` began this life."""

    step: int
    fork_step: int
    batch: TrainBatch | None
    protect: Collection[int] = ()


class Publisher:
    """Writes a folder, hands it to the transport, announces it. Numbers strictly rise.

    Only a copy and the probe need the weights: in a pipelined run the rest goes on beside the next
    batch (``learner.publish_async``). In rounds nobody works meanwhile: the folder is written
    without a copy, and all of it is waited for.
    """

    def __init__(
        self,
        broker: Broker,
        fence: Fence,
        transport: Transport,
        backend: Backend,
        thread: TorchThread,
        config: Config,
        offer: Callable[[WeightManifest], WeightManifest] = lambda manifest: manifest,
    ) -> None:
        """``offer`` adds to a published manifest where its tensors can be pulled; at once."""
        self._broker = broker
        self._fence = fence
        self._transport = transport
        self._backend = backend
        self._thread = thread
        self._config = config
        self._offer = offer
        self._exports = VersionExports(
            config.run_dir / "exports",
            config.learner.export_every_versions,
            config.learner.keep_exports,
        )
        self._is_beside = config.learner.publish_async and config.schedule.mode == "pipelined"
        self._announcing: asyncio.Task[None] | None = None
        self._log = structlog.get_logger(__name__)
        self.last_version = 0
        """Highest number known to be used; the next one is one above."""
        self.announce_s = 0.0
        """What the newest announced version took from its copy to its announcement, seconds."""

    async def learn_numbers(self, *seen: int) -> None:
        """Number above everything the broker, the transport and ``seen`` know. Nothing may be
        under way.

        A version may be whole in the transport without being announced, and a Redis that lost its
        tail may have forgotten some.
        """
        await asyncio.to_thread(self._sweep)
        steps = await self._broker.version_steps()
        meta = await self._broker.run_meta()
        self.last_version = max(
            self.last_version,
            max(steps, default=0),
            int(meta.get("latest_version", "0") or 0),
            await self._transport.highest_version(),
            *seen,
        )

    async def begin(self, publication: Publication) -> int:
        """Publish the weights as they are now; returns the version number.

        Returns when they may change: announced without ``learner.publish_async`` and in rounds,
        else with that under way. Raises what ``settle`` does.
        """
        await self.settle()
        version = self.last_version + 1
        staging = self._config.run_dir / "publish" / f"v{version:06d}-f{self._fence.token}"
        probe, written = await self._thread.run(self._write, staging, publication.batch)
        fields = VersionFields(
            run=self._config.run.name,
            policy_version=version,
            learner_step=publication.step,
            fork_step=publication.fork_step,
            fence=self._fence.token,
            probe=probe,
            created_ms=await self._broker.now_ms(),
        )
        self.last_version = version  # used up, whether it gets announced or not
        announcing = self._announce(staging, fields, publication.protect, written)
        self._announcing = asyncio.create_task(announcing, name="publish")
        if not self._is_beside:
            await self.settle()
        return version

    async def settle(self) -> float:
        """Wait for the announcement under way, if there is one; returns the seconds that took.

        Raises ``WeightError`` while publication is blocked because two workers refused a version,
        and what ended it otherwise.
        """
        began = time.monotonic()
        if self._announcing is not None:
            await asyncio.wait({self._announcing})  # whose own end may not cancel the announcement
            self.check()
        return time.monotonic() - began

    def check(self) -> None:
        """Raise what ended the announcement under way, at once; nothing while it goes on."""
        if self._announcing is not None and self._announcing.done():
            announcing, self._announcing = self._announcing, None
            announcing.result()

    async def close(self) -> None:
        """Give an announcement up that is still under way when the learner ends by an error; a
        thread of the transport gets some seconds to come to its end before."""
        if self._announcing is None:
            return
        announcing, self._announcing = self._announcing, None
        await asyncio.wait({announcing}, timeout=_LEAVING_S)
        announcing.cancel()
        await asyncio.wait({announcing})
        if not announcing.cancelled() and (error := announcing.exception()) is not None:
            self._log.warning("the last version was not announced", why=str(error))

    async def _announce(
        self,
        staging: Path,
        fields: VersionFields,
        protect: Collection[int],
        written: Future[None] | None,
    ) -> None:
        began = time.monotonic()
        if written is not None:
            await asyncio.wrap_future(written)
        version, step = fields.policy_version, fields.learner_step
        export = await asyncio.to_thread(self._exports.begin, staging, fields)
        manifest = await self._transport.publish(staging, fields, consume=True, protect=protect)
        crashpoints.reach("publishing", step)
        info = VersionInfo(version, step, fields.fork_step, dump_manifest(self._offer(manifest)))
        keep = max(8, self._config.weights.keep_versions + 1)
        await self._broker.publish(self._fence, info, keep)
        crashpoints.reach("published", step)
        await asyncio.to_thread(self._exports.finish, export, version)
        shutil.rmtree(staging, ignore_errors=True)
        self.announce_s = time.monotonic() - began
        self._log.info(
            "weights published", version=version, step=step, announce_s=round(self.announce_s, 3)
        )

    def _sweep(self) -> None:
        """Remove folders that killed learners, or this one, wrote and did not hand over."""
        for path in (self._config.run_dir / "publish").glob("v*-f*"):
            if int(path.name.rpartition("-f")[2]) <= self._fence.token:
                shutil.rmtree(path, ignore_errors=True)

    def _write(
        self, staging: Path, batch: TrainBatch | None
    ) -> tuple[tuple[ProbeSequence, ...], Future[None] | None]:
        """The probe, and the folder's writing where that goes on."""
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        written: Future[None] | None = None
        if self._is_beside:
            written = self._backend.begin_export(staging)
        else:
            self._backend.save_hf(staging)
        return self._probe(batch), written

    def _probe(self, batch: TrainBatch | None) -> tuple[ProbeSequence, ...]:
        if not self._config.weights.canary:
            return ()
        count = self._config.weights.probe_sequences
        sequences = probe_sequences(batch, count) if batch is not None else []
        if not sequences:
            sequences = self._backend.sample(count, _SAMPLED_TOKENS, self._config.run.seed)
        logprobs = self._backend.logprobs(sequences, temperature=1.0)
        return tuple(
            ProbeSequence(
                prompt_ids=one.prompt_ids,
                token_ids=one.token_ids,
                logprobs=tuple(float(value) for value in values),
            )
            for one, values in zip(sequences, logprobs, strict=True)
        )


def probe_sequences(batch: TrainBatch, count: int) -> list[ScoredSequence]:
    """Up to ``count`` responses of the batch, those of the newest versions first.

    Each is cut at its first environment token: the probe is on-policy tokens only.
    """
    trajectories = [item.trajectory for item in batch.items]
    newest = sorted(trajectories, key=_newest_version, reverse=True)
    found: list[ScoredSequence] = []
    for trajectory in newest:
        length = min(_policy_prefix(trajectory.loss_mask), _PROBE_TOKENS)
        if length and len(found) < count:
            found.append(
                ScoredSequence(
                    tuple(trajectory.prompt_ids.tolist()),
                    tuple(trajectory.token_ids[:length].tolist()),
                )
            )
    return found


def _newest_version(trajectory: Trajectory) -> int:
    return int(trajectory.policy_versions.max(initial=0))


def _policy_prefix(loss_mask: Sequence[bool] | np.ndarray) -> int:
    others = np.flatnonzero(~np.asarray(loss_mask, dtype=np.bool_))
    return int(others[0]) if others.size else len(loss_mask)
