"""After a restart, or when Redis lost its tail: make the broker agree with the journal.

The journal is the truth of what was taken. A reservation that was not journalled is given back; a
batch that was journalled is committed again, by force when Redis does not know it any more.
"""

from __future__ import annotations

import structlog

from learner.journal import Entry, Journal
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
    unsettled = _unsettled(journal, states, trained_offset)
    forced = 0
    for entry, record in journal.read(unsettled[0].offset) if unsettled else ():
        if entry in unsettled:
            trained = entry.end <= trained_offset
            forced += await _settle(broker, fence, record, states.get(entry.batch_id), trained)
    if forced:
        log.warning("batches that Redis had lost were taken by force", batches=forced)
    return forced


def _unsettled(journal: Journal, states: dict[str, str], trained_offset: int) -> list[Entry]:
    """Entries that the broker does not hold as the journal does, oldest first.

    Redis keeps a bounded number of trained batches and can lose only its newest writes: an entry
    that it does not know counts as lost only behind the newest one that it does know.
    """
    places = [i for i, entry in enumerate(journal.entries) if entry.batch_id in states]
    newest = places[-1] if places else -1
    found = []
    for index, entry in enumerate(journal.entries):
        state = states.get(entry.batch_id)
        lost = state is None and index > newest
        untrained = state == "taken" and entry.end <= trained_offset
        if lost or untrained or state == "reserved":
            found.append(entry)
    return found


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
        {group.group_id: (tokens[group.group_id], len(group.rollouts)) for group in record.groups},
    )
