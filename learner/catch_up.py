"""Training again what the journal holds: after a crash, and in ``ringasync replay``.

A record holds the batch after selection: order, cut tail, carried trajectories, advantages and
ages. So a batch comes out the same without Redis, the selection or the clock.
"""

from __future__ import annotations

from collections.abc import Iterator

from learner.backends.base import Backend, StepResult
from learner.batch import TrainBatch
from learner.journal import Entry, JournalReader
from learner.record import BatchRecord
from learner.state import LearnerState
from ringasync.errors import JournalError


def untrained_records(
    journal: JournalReader, state: LearnerState
) -> Iterator[tuple[Entry, BatchRecord]]:
    """Batches behind ``state``, in order.

    Consumes the journal's records; the caller trains each and advances ``state`` before it asks for
    the next. Raises ``JournalError`` when one is missing.
    """
    for entry, record in journal.read(state.journal_offset):
        if record.step != state.step:
            raise JournalError(
                f"the journal misses the batch of step {state.step + 1}: batch {record.batch_id} "
                f"of step {record.step + 1} comes instead. Restore the folder from a copy"
            )
        yield entry, record


def train_record(backend: Backend, record: BatchRecord) -> tuple[TrainBatch, StepResult]:
    """Train one journalled batch, a function of the record and of the backend's state."""
    batch = record.train_batch()
    return batch, backend.train_batch(batch)
