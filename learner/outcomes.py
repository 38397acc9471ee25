"""What the learner learns from how groups ended elsewhere: prompts that need not be fed again."""

from __future__ import annotations

from learner.state import LearnerState
from ringasync.broker.client import Broker
from ringasync.records.states import GroupState

_OUTCOMES_A_CALL = 1000
_CLOSED_WITHOUT_TRAINING = (
    GroupState.FILTERED,
    GroupState.STALE,
    GroupState.PURGED,
    GroupState.QUARANTINED,
    GroupState.GRADE_ERROR,
)


async def note_closed_groups(broker: Broker, state: LearnerState) -> None:
    """Close the prompts of groups that ended untrained in ``state.position``.

    Reads the outcomes after ``state.outcomes_seen`` up to the newest.
    """
    while True:
        outcomes = await broker.read_outcomes(state.outcomes_seen, _OUTCOMES_A_CALL)
        closed: list[int] = []
        for outcome in outcomes:
            state.outcomes_seen = outcome.entry_id
            if outcome.rollout_id:  # replaced by a sibling: its group goes on
                continue
            if outcome.kind == "train" and outcome.end in _CLOSED_WITHOUT_TRAINING:
                group = await broker.group(outcome.group_id)
                if group and "source_index" in group:
                    closed.append(int(group["source_index"]))
        state.position = state.position.close(closed)
        if len(outcomes) < _OUTCOMES_A_CALL:
            return
