"""Algorithm 1 of C3PO++ (Ring-1T, section 2.3.3) as a state machine over counts.

::

    none --purge (retention > sigma), open--> open --budget reached--> closing
      ^                                       (feed up to Omega)          | every lease is back,
      '---- learner finished the round ---- training <--------------------' nothing in grading

Reading of the paper. A prompt brings its whole group: while the pool holds fewer than Omega
rollouts a prompt is added, so a pool of groups of G may reach Omega + G - 1. That rule gives
Figure 4 exactly. Closing raises the retention of every unfinished rollout by one; rollouts whose
retention is *strictly* above sigma are purged before the next round opens.

What counts toward Phi: ``trainable`` tokens of complete, unfiltered groups that the learner has
not trained yet, surplus of the last round included (it needs no second generation); ``completed``
tokens of rollouts that finished in this round, whole length (the algorithm to the letter);
``generated`` tokens appended in this round (the text).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

RoundState = Literal["none", "open", "closing", "training"]
RoundActionKind = Literal["wait", "purge_and_open", "feed", "close", "to_training", "end"]
BudgetCount = Literal["trainable", "completed", "generated"]


@dataclass(frozen=True, slots=True)
class RoundSettings:
    """Phi, what counts toward it, Omega and the group size."""

    budget_tokens: int
    count: BudgetCount
    pool_capacity: int
    group_size: int

    def __post_init__(self) -> None:
        if min(self.budget_tokens, self.pool_capacity, self.group_size) < 1:
            raise ValueError(f"impossible round settings: {self}")


@dataclass(frozen=True, slots=True)
class RoundView:
    """What the machine sees, read at one moment.

    ``pool``: queued, parked and leased train rollouts. ``waiting_tokens``: complete groups that
    are ready or taken and not trained. ``data_ended``: no prompt is left, or none shall be fed.
    """

    round_id: int
    state: RoundState
    pool: int
    grading: int
    waiting_tokens: int
    completed_tokens: int
    generated_tokens: int
    data_ended: bool = False


@dataclass(frozen=True, slots=True)
class RoundAction:
    """The next thing to do. ``groups`` is set for ``feed``, ``round_id`` for ``purge_and_open``."""

    kind: RoundActionKind
    reason: str
    groups: int = 0
    round_id: int = 0


def counted_tokens(view: RoundView, count: BudgetCount) -> int:
    """C of Algorithm 1 under this way of counting."""
    if count == "trainable":
        return view.waiting_tokens
    return view.completed_tokens if count == "completed" else view.generated_tokens


def groups_to_fill(pool: int, settings: RoundSettings) -> int:
    """Prompts that ``while |P| < Omega: add a prompt`` would add, each bringing its group."""
    return max(0, math.ceil((settings.pool_capacity - pool) / settings.group_size))


def next_action(view: RoundView, settings: RoundSettings) -> RoundAction:
    """Decide one step of the machine; called until it answers ``wait``.

    ``end`` is answered once the data have ended and nothing is left that could be trained.
    """
    if view.state == "none":
        if view.data_ended and view.pool + view.grading + view.waiting_tokens == 0:
            return RoundAction("end", "the data have ended and nothing is left to train")
        return RoundAction(
            "purge_and_open", "previous round is trained", round_id=view.round_id + 1
        )
    if view.state == "open":
        return _while_open(view, settings)
    if view.state == "closing":
        if view.grading > 0:
            return RoundAction("wait", f"{view.grading} finished rollouts are being graded")
        return RoundAction("to_training", "every finished rollout has its verdict")
    return RoundAction("wait", f"the learner trains round {view.round_id}")


def _while_open(view: RoundView, settings: RoundSettings) -> RoundAction:
    counted = counted_tokens(view, settings.count)
    fill = f"{counted} of {settings.budget_tokens} tokens ({settings.count})"
    if counted >= settings.budget_tokens:
        return RoundAction("close", fill)
    groups = 0 if view.data_ended else groups_to_fill(view.pool, settings)
    if groups > 0:
        return RoundAction("feed", f"pool {view.pool} of {settings.pool_capacity}", groups=groups)
    if view.pool + view.grading == 0:
        # Nothing can add to the count any more: an endless round would be a silent hang.
        return RoundAction("close", f"nothing is left to generate; {counted} tokens counted")
    return RoundAction("wait", f"{fill}, pool {view.pool}")


def to_purge(retention: Mapping[str, int], sigma: int | None) -> list[str]:
    """Rollouts to purge before a round: retention strictly above sigma; None purges nothing."""
    if sigma is None:
        return []
    return sorted(rollout_id for rollout_id, carried in retention.items() if carried > sigma)
