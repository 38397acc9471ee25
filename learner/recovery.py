"""After a restart, or when Redis lost its tail: make the broker agree with the journal.

The journal is the truth of what was taken. A reservation that was not journalled is given back; a
batch that was journalled is committed again, by force when Redis does not know it any more.
"""

from __future__ import annotations

import structlog

from learner.journal import Journal
from learner.record import BatchRecord
from ringasync.broker.client import Broker
from ringasync.broker.types import Fence
from ringasync.errors import JournalError


async def reconcile(broker: Broker, fence: Fence, journal: Journal, trained_offset: int) -> int:
    """Settle every batch of the journal with the broker; returns how many had to be forced.

    Records that end at or before ``trained_offset`` are in the present weights and are marked
    trained as well; those after it are only taken. Doing it again changes nothing.

    Raises ``JournalError`` when the broker holds a taken batch that the journal lacks: its payloads
    are gone, so training on would silently lose it.
    """
    log = structlog.get_logger(__name__)
    states = await broker.batches()
    known = {entry.batch_id for entry in journal.entries}
    for batch_id, state in states.items():
        if batch_id in known:
            continue
        if state != "reserved":
            raise JournalError(
                f"batch {batch_id} is {state} in Redis but not in the journal: the journal folder "
                "is not this run's, or its end was lost. Restore it, or start the run afresh"
            )
        log.info("reservation given back", batch=batch_id)
        await broker.release(fence, batch_id)
    forced = 0
    start = _first_unsettled(journal, states, trained_offset)
    if start is None:
        return 0
    for entry, record in journal.read(start):
        forced += await _settle(
            broker, fence, record, states.get(entry.batch_id), entry.end <= trained_offset
        )
    if forced:
        log.warning("batches that Redis had lost were taken by force", batches=forced)
    return forced


def _first_unsettled(
    journal: Journal, states: dict[str, str], trained_offset: int
) -> int | None:
    """Offset of the first record that may need work; None when all is settled.

    Redis keeps a bounded number of trained batches and loses only its newest writes. So an entry it
    does not know, before one that it does know, was trained long ago.
    """
    first: int | None = None
    for entry in reversed(journal.entries):
        state = states.get(entry.batch_id)
        settled = state == "trained" or (state == "taken" and entry.end > trained_offset)
        if not settled and state is None and first is not None and _known_later(
            journal, states, entry.offset
        ):
            break
        if not settled:
            if state is None and _known_later(journal, states, entry.offset):
                break
            first = entry.offset
    return first


def _known_later(journal: Journal, states: dict[str, str], offset: int) -> bool:
    return any(e.offset > offset and e.batch_id in states for e in journal.entries)


async def _settle(
    broker: Broker, fence: Fence, record: BatchRecord, state: str | None, trained: bool
) -> int:
    """Bring one journalled batch to taken or trained; 1 when it was forced."""
    forced = 0
    if state == "reserved":
        await broker.commit(fence, record.batch_id, record.trajectories_per_group)
    elif state is None:
        await force(broker, fence, record)
        forced = 1
    if trained and state != "trained":
        await broker.mark_trained(fence, record.batch_id, record.trained_tokens(), record.step + 1)
    return forced


async def force(broker: Broker, fence: Fence, record: BatchRecord) -> None:
    """Mark the record's new groups taken, whatever state they are back in."""
    credited = record.credited()
    tokens = {group.group_id: 0 for group in record.groups}
    for one in credited.values():
        if one.group_id in tokens:
            tokens[one.group_id] += one.trajectory().num_policy_tokens
    await broker.force_taken(
        fence,
        record.batch_id,
        [
            (group.group_id, tokens[group.group_id], len(group.rollouts))
            for group in record.groups
        ],
    )
