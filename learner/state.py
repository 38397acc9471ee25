"""What a learner knows between two steps; with the tensors it is what a checkpoint restores."""

from __future__ import annotations

from dataclasses import dataclass, field

from learner.batch import TrainBatch
from learner.checkpoint import CheckpointMeta
from learner.record import BatchRecord, CarriedRollout
from ringasync.scheduling.watermark import DataPosition


@dataclass(slots=True)
class LearnerState:
    """Progress of the run as this learner has it.

    ``step`` batches are in the weights, up to ``journal_offset``. ``fork_step`` is the step up to
    which this life shares the history of earlier ones: everything journalled before it began.
    ``policy_version`` numbers the weights of ``published_step``, announced or about to be; -1 there
    if none of this line were published.
    ``checkpoint_step`` is the step of the checkpoint that this life began from, -1 if none.
    """

    step: int = 0
    journal_offset: int = 0
    carry: tuple[CarriedRollout, ...] = ()
    policy_version: int = 0
    last_round_id: int = 0
    fork_step: int = 0
    published_step: int = -1
    checkpoint_step: int = -1
    position: DataPosition = field(default_factory=DataPosition)
    last_batch: TrainBatch | None = None
    outcomes_seen: str = "0"

    @classmethod
    def from_meta(cls, meta: CheckpointMeta, carry: tuple[CarriedRollout, ...]) -> LearnerState:
        """The state that a checkpoint holds."""
        return cls(
            step=meta.step,
            journal_offset=meta.journal_offset,
            carry=carry,
            policy_version=meta.policy_version,
            last_round_id=meta.last_round_id,
            fork_step=meta.step,
            checkpoint_step=meta.step,
            position=DataPosition.from_json(meta.data_position),
        )

    def advance(self, record: BatchRecord, end: int, batch: TrainBatch) -> None:
        """Account for a trained record that ends at journal offset ``end``."""
        self.step = record.step + 1
        self.journal_offset = end
        self.last_round_id = max(self.last_round_id, record.round_id)
        self.position = self.position.close(closed_sources(record))
        self.carry = record.carry()
        self.last_batch = batch

    def meta(self, run: str, fence: int, life: int) -> CheckpointMeta:
        """What a checkpoint of this state says."""
        return CheckpointMeta(
            run=run,
            step=self.step,
            fence=fence,
            life=life,
            journal_offset=self.journal_offset,
            policy_version=self.policy_version,
            last_round_id=self.last_round_id,
            data_position=self.position.to_json(),
            published_step=self.published_step,
        )


def closed_sources(record: BatchRecord) -> set[int]:
    """Prompts that need never be fed again: the journal and the checkpoints have their groups."""
    return {group.source_index for group in record.groups}
