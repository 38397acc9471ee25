"""The pipelined admission gate: how many groups to feed now, and why.

The rule. *Open* groups, those admitted and neither trained nor ended otherwise, hold at most
``limit = (max_staleness + 1) * budget`` estimated tokens (known lengths, else the running mean).
No version number enters.

That alone (``overtaking=False``) does not bound the staleness of a long rollout: while one group
generates, younger ones are admitted into the places of trained ones and overtake it without end.
So the gate also counts what has **already overtaken**: tokens trained since the oldest unfinished
group was admitted. The rule enforced by default is::

    open_tokens + overtaken_tokens <= limit

**Bound.** Let group g be the oldest unfinished one at the last admission before g is complete, O
the open tokens then (g's own among them), T the tokens trained since g's admission, E the sum of
what the groups unfinished then turn out longer than estimated. Every token trained between g's
admission and g's own training was either trained by then (T) or open then and not g's own (at most
O + E - |g|). Every learner step uses at least ``budget`` tokens, so the steps s in between satisfy
``s * budget <= T + O + E - |g| <= (max_staleness + 1) * budget + E - |g|``. With true estimates
(E <= 0) and |g| > 0 that is ``s <= max_staleness``. An unfinished group that is not the oldest has
a smaller T, so the bound holds for it as well. On top of s come only: the steps by which the
worker's loaded version lagged behind at the first token, one step if the batch that takes g cuts
its surplus into the next one, and waiting of a complete group for younger ones, which
oldest-first reservation excludes. Reservation checks the actual staleness in any case.

**Liveness.** The gate never closes while ready tokens are below the budget and nothing is running:
it then admits what fills the budget, at least one group, whatever the limit says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GateSettings:
    """What the gate is set to. ``max_groups`` bounds one feeding call."""

    budget_tokens: int
    max_staleness: int
    group_size: int
    overtaking: bool = True
    max_groups: int = 256

    def __post_init__(self) -> None:
        if min(self.budget_tokens, self.group_size, self.max_groups) < 1 or self.max_staleness < 0:
            raise ValueError(f"impossible gate settings: {self}")

    @property
    def limit_tokens(self) -> int:
        """Most estimated tokens that open groups may hold."""
        return (self.max_staleness + 1) * self.budget_tokens


@dataclass(frozen=True, slots=True)
class GateView:
    """What the gate sees, read at one moment. All in policy tokens or counts.

    ``known_tokens``: open groups' rollouts of known length, reserved and taken ones included.
    ``unfinished_rollouts``: admitted rollouts of unknown length; ``unfinished_tokens`` what they
    hold so far (0 when not known). ``ready_tokens``: what the learner could train at once.
    ``running``: rollouts that can still become ready (queued, parked, leased, in grading).
    ``overtaken_tokens``: tokens trained since the oldest unfinished group was admitted.
    """

    known_tokens: int
    unfinished_rollouts: int
    waiting_tokens: int
    running: int
    unfinished_tokens: int = 0
    overtaken_tokens: int = 0
    unloaded_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Admission:
    """How many groups to feed now, the sentence that says why, and the sums behind it."""

    groups: int
    reason: str
    open_tokens: float
    limit_tokens: int


def open_tokens(view: GateView, mean_length_tokens: float) -> float:
    """Estimated tokens of all open groups.

    What unfinished rollouts already hold is a floor: late in a heavy tail they are longer than
    the mean, and each will grow by at least one token more.
    """
    expected = view.unfinished_rollouts * mean_length_tokens
    return view.known_tokens + max(expected, view.unfinished_tokens + view.unfinished_rollouts)


def admit(view: GateView, settings: GateSettings, mean_length_tokens: float) -> Admission:
    """Decide how many groups to feed now (see the module for the rule and its bound)."""
    group_tokens = max(1.0, settings.group_size * mean_length_tokens)
    held = open_tokens(view, mean_length_tokens)
    overtaken = view.overtaken_tokens if settings.overtaking else 0
    limit = settings.limit_tokens
    groups = max(0, math.floor((limit - held - overtaken) / group_tokens))
    if groups > 0:
        reason = f"open {held:.0f} + overtaken {overtaken} of {limit} tokens"
    elif view.running == 0 and view.waiting_tokens < settings.budget_tokens:
        missing = settings.budget_tokens - view.waiting_tokens
        groups = max(1, math.ceil(missing / group_tokens))
        reason = f"nothing runs and {missing} tokens are missing to the budget"
    elif held + group_tokens > limit:
        reason = f"full: open groups hold {held:.0f} of {limit} tokens"
    else:
        reason = (
            f"waiting for the oldest group: {overtaken} tokens trained since it was admitted, "
            f"{held:.0f} open, limit {limit}"
        )
    return Admission(min(groups, settings.max_groups), reason, held, limit)
