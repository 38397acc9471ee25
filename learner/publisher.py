"""Publish the present weights as the next policy version, with a canary probe."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Collection, Sequence
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


@dataclass(frozen=True, slots=True)
class Publication:
    """What is published: the weights after ``step`` batches; ``fork_step`` began this life."""

    step: int
    fork_step: int
    batch: TrainBatch | None
    protect: Collection[int] = ()


class Publisher:
    """Writes a folder, hands it to the transport, announces it. Numbers strictly rise."""

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
        self._log = structlog.get_logger(__name__)
        self.last_version = 0
        """Highest number known to be used; the next one is one above."""

    async def learn_numbers(self, *seen: int) -> None:
        """Number above everything the broker, the transport and ``seen`` know.

        A version may be whole in the transport without being announced, and a Redis that lost its
        tail may have forgotten some.
        """
        steps = await self._broker.version_steps()
        meta = await self._broker.run_meta()
        self.last_version = max(
            self.last_version,
            max(steps, default=0),
            int(meta.get("latest_version", "0") or 0),
            await self._transport.highest_version(),
            *seen,
        )

    async def publish(self, publication: Publication) -> int:
        """Publish the weights as they are now; returns the version number.

        Raises ``WeightError`` while publication is blocked because two workers refused a version.
        """
        version = self.last_version + 1
        staging = self._config.run_dir / "publish" / f"v{version:06d}-f{self._fence.token}"
        probe = await self._thread.run(self._write, staging, publication.batch)
        fields = VersionFields(
            run=self._config.run.name,
            policy_version=version,
            learner_step=publication.step,
            fork_step=publication.fork_step,
            fence=self._fence.token,
            probe=probe,
            created_ms=await self._broker.now_ms(),
        )
        export = await asyncio.to_thread(self._exports.begin, staging, fields)
        manifest = await self._transport.publish(
            staging, fields, consume=True, protect=publication.protect
        )
        self.last_version = version  # used up, whether it gets announced or not
        crashpoints.reach("publishing", publication.step)
        info = VersionInfo(
            version, publication.step, publication.fork_step, dump_manifest(self._offer(manifest))
        )
        keep = max(8, self._config.weights.keep_versions + 1)
        await self._broker.publish(self._fence, info, keep)
        crashpoints.reach("published", publication.step)
        await asyncio.to_thread(self._exports.finish, export, version)
        shutil.rmtree(staging, ignore_errors=True)
        self._log.info("weights published", version=version, step=publication.step)
        return version

    def _write(self, staging: Path, batch: TrainBatch | None) -> tuple[ProbeSequence, ...]:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        self._backend.save_hf(staging)
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
