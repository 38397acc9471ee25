"""Checkpoints beside the training: it stops while the state is copied, not while it is written.

::

    loop: step, publish -> copy the state (staging) -> next step ...
    beside it:                 write tensors, fsync -> seal (meta, checksums) -> final name, prune

consumes       the backend's state, the meta and the carry of the moment of staging
produces       checkpoint folders; ``written_step``, ``failures`` and ``last_failure`` for metrics
waits for      a write under way before the next begins, and at the learner's end
unblocked by   the disk
"""

from __future__ import annotations

import asyncio
import contextlib
import time

import structlog

from learner.backends.base import Backend
from learner.checkpoint import CheckpointMeta, PendingCheckpoint
from learner.record import CarriedRollout
from learner.worker_thread import TorchThread
from ringasync.broker.client import Broker
from ringasync.broker.types import Fence
from ringasync.config.schema import Config
from ringasync.errors import CheckpointError, FencedError
from ringasync.runtime import crashpoints


class Checkpointer:
    """At most one checkpoint under way; one that fails is said and the run goes on.

    A checkpoint only shortens the catch-up, since the journal holds every batch. So a full disk
    stops nothing before the end: the last good one stays, and the next due step tries again.
    """

    def __init__(
        self,
        broker: Broker,
        fence: Fence,
        backend: Backend,
        thread: TorchThread,
        config: Config,
        written_step: int,
    ) -> None:
        """``written_step`` is the step of the checkpoint that this life began from, -1 if none."""
        self._broker = broker
        self._fence = fence
        self._backend = backend
        self._thread = thread
        self._config = config
        self._directory = config.run_dir / "checkpoints"
        self._writing: asyncio.Task[None] | None = None
        self._writing_step = -1
        self.written_step = written_step
        self.failures = 0
        self.last_failure: CheckpointError | None = None
        """Why the newest attempt failed; None once one succeeded."""
        self._log = structlog.get_logger(__name__)

    async def begin(self, meta: CheckpointMeta, carry: tuple[CarriedRollout, ...]) -> float:
        """Checkpoint this moment unless it has been; returns the seconds that training stood still.

        Returns when the state is copied, or written without ``learner.checkpoint_async``. Raises
        ``FencedError`` when the lock is lost; a failure to write is logged and counted.
        """
        self._reap()
        if meta.step in (self.written_step, self._writing_step):
            return 0.0
        began = time.monotonic()
        if self._writing is not None:
            self._log.warning(
                "the checkpoint before is still being written: training waits for it. "
                "Raise learner.checkpoint_every_steps, or look at the disk",
                step=meta.step,
                before=self._writing_step,
            )
            await self.settle()
        await self._broker.renew_lock(self._fence, self._config.learner.lock_ttl_ms)
        try:
            pending = await self._thread.run(
                PendingCheckpoint.begin, self._directory, meta, carry, self._backend.begin_save
            )
        except CheckpointError as error:
            self._failed(meta, error)
            return time.monotonic() - began
        crashpoints.reach("checkpoint_staged", meta.step)
        self._writing_step = meta.step
        self._writing = asyncio.create_task(self._write(pending), name="checkpoint")
        if not self._config.learner.checkpoint_async:
            await self.settle()
        return time.monotonic() - began

    async def settle(self) -> None:
        """Wait for the checkpoint under way, if there is one. Raises ``FencedError``."""
        if self._writing is not None:
            await asyncio.wait({self._writing})  # whose own end may not cancel the write
            self._reap()

    async def finish(self, meta: CheckpointMeta, carry: tuple[CarriedRollout, ...]) -> None:
        """The checkpoint of the learner's end: as ``begin``, waited for.

        Raises ``CheckpointError`` when it could not be written, not even by trying again what
        failed in the background.
        """
        await self.settle()
        await self.begin(meta, carry)
        await self.settle()
        if self.written_step != meta.step:
            raise CheckpointError(
                f"the last checkpoint, of step {meta.step}, could not be written: "
                f"{self.last_failure}. Nothing is lost: the journal holds every batch after step "
                f"{max(self.written_step, 0)}, and a learner started again trains them once more"
            )

    async def close(self) -> None:
        """Let what is under way come to its end, also when the learner ends by an error.

        It is of a moment before that error, so it is as good as any. After the loss of the lock it
        ends without a name, and the learner knows already.
        """
        with contextlib.suppress(FencedError):
            await self.settle()

    def _reap(self) -> None:
        """Let go of a write that has ended, and raise what it raised."""
        if self._writing is not None and self._writing.done():
            writing, self._writing, self._writing_step = self._writing, None, -1
            writing.result()

    async def _write(self, pending: PendingCheckpoint) -> None:
        began = time.monotonic()
        meta = pending.meta
        try:
            await asyncio.to_thread(pending.seal)
            # Whoever lost the lock while it wrote must not name it.
            await self._broker.renew_lock(self._fence, self._config.learner.lock_ttl_ms)
            path = await asyncio.to_thread(
                pending.publish, keep=self._config.learner.checkpoint_keep
            )
        except CheckpointError as error:
            self._failed(meta, error)
            return
        finally:
            await asyncio.to_thread(pending.discard)
        crashpoints.reach("checkpointed", meta.step)
        self.written_step = meta.step
        self.last_failure = None
        self._log.info(
            "checkpoint written",
            path=str(path),
            step=meta.step,
            write_s=round(time.monotonic() - began, 3),
        )

    def _failed(self, meta: CheckpointMeta, error: CheckpointError) -> None:
        self.failures += 1
        self.last_failure = error
        self._log.error(
            "checkpoint not written; training goes on, the journal holds every batch",
            step=meta.step,
            last_good_step=self.written_step,
            why=str(error),
        )
