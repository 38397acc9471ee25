"""The pipelined admission gate: how many groups to feed now, and why.

**The rule of the design.** *Open* groups, those admitted and neither trained nor ended otherwise,
hold at most ``limit = (max_staleness + 1) * budget`` estimated tokens (known lengths, else the
running mean). No version number enters. In the simulation that alone lets far too much through, so
it is made stricter in three ways::

    open + unloaded + overtaking_weight * (overtaken - unloaded) <= limit

``open``: what is unfinished has grown already, see ``open_tokens``.

``unloaded``: tokens trained into versions that the slowest worker has not taken up yet. Room that
a step frees is filled at once, by rollouts that begin under the *old* version: one step too old
from their first token on.

``overtaken``: tokens trained beyond the weights that the slowest worker had when the oldest
unfinished group was admitted. While a long rollout generates, younger ones take the places of
trained ones and overtake it without end.

**Bound** (weight 1). Let g be a group, look at the last admission before g is complete; O the open
tokens then (g's own, |g|, among them), T the tokens trained by then that the slowest worker's
weights at g's admission did not have, E what the groups unfinished then turn out longer than
estimated. g's first token has those weights or newer ones. The tokens trained between them and
g's own batch were either trained by then (T) or open then and not g's (at most O + E - |g|):
complete groups are reserved oldest first, so nothing admitted later comes before g. Each learner
step uses at least ``budget`` tokens; so for the number s of steps in between

    s * budget <= T + O + E - |g| <= (max_staleness + 1) * budget + E - |g|

and s <= max_staleness when estimates are true (E <= 0). T of a group is at most T of the oldest
unfinished one, so the oldest speaks for all. What the last group of a batch has beyond the budget
is carried into the next one, hence **max_staleness + 1 for carried trajectories**, and E / budget
more with underestimated lengths. What is older still ends as stale at reservation in any case.

**Price.** With weight 1 and rollouts that take longer than max_staleness steps, everybody waits for
the longest: no schedule that neither drops nor overruns can be faster. Without it (0) long rollouts
go stale and what is trained is biased short. ``docs/scheduling.md`` has the figures; the default of
0.25 is a compromise.

**Liveness.** The gate never closes while complete untrained tokens (ready, reserved or taken) are
below the budget and nothing is running: it then admits what fills the budget, at least one group,
whatever the limit says. A worker that loads weights counts as running, so the caller must let
``unloaded_tokens`` lapse to 0 when a worker does not come to an end with that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

DEFAULT_OVERTAKING_WEIGHT = 0.25


@dataclass(frozen=True, slots=True)
class GateSettings:
    """What the gate is set to.

    ``overtaking_weight`` 0 leaves overtaking out, 1 gives the proven bound; ``max_groups`` bounds
    one feeding call.
    """

    budget_tokens: int
    max_staleness: int
    group_size: int
    overtaking_weight: float = DEFAULT_OVERTAKING_WEIGHT
    max_groups: int = 256

    def __post_init__(self) -> None:
        sizes = (self.budget_tokens, self.group_size, self.max_groups)
        if min(sizes) < 1 or self.max_staleness < 0 or not 0 <= self.overtaking_weight <= 1:
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
    hold so far (0 when not known). ``waiting_tokens``: complete groups that are not trained
    (ready, reserved, taken). ``running``: rollouts that can still become ready (queued, parked,
    leased, in grading). ``overtaken_tokens`` and ``unloaded_tokens``: see the module.
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
    """Estimated tokens of all open groups: known lengths, and for each unfinished rollout what it
    holds and a mean length more.

    What is still unfinished is longer than the mean, so the mean alone falls short (the open
    groups then truly hold up to 2.2 times the limit under heavy tails). A whole mean on top of
    what is there is right for lengths without memory, too much for light tails and too little for
    heavier ones: measured, the true sum stays within 1.0 to 1.3 times the limit.
    """
    expected = view.unfinished_tokens + view.unfinished_rollouts * mean_length_tokens
    return view.known_tokens + expected


def admit(view: GateView, settings: GateSettings, mean_length_tokens: float) -> Admission:
    """Decide how many groups to feed now (see the module for the rule and its bound)."""
    group_tokens = max(1.0, settings.group_size * mean_length_tokens)
    held = open_tokens(view, mean_length_tokens)
    overtaken = max(0, view.overtaken_tokens - view.unloaded_tokens)
    limit = settings.limit_tokens
    charged = held + view.unloaded_tokens + settings.overtaking_weight * overtaken
    groups = max(0, math.floor((limit - charged) / group_tokens))
    if groups > 0:
        reason = f"{charged:.0f} of {limit} tokens are charged"
    elif _must_feed(view, settings):
        missing = settings.budget_tokens - view.waiting_tokens
        groups = max(1, math.ceil(missing / group_tokens))
        reason = f"nothing runs and {missing} tokens are missing to the budget"
    else:
        reason = _why_closed(view, held, group_tokens, limit)
    return Admission(min(groups, settings.max_groups), reason, held, limit)


def _must_feed(view: GateView, settings: GateSettings) -> bool:
    """Whether the learner would wait for ever. Workers that load new weights count as running."""
    idle = view.running == 0 and view.unloaded_tokens == 0
    return idle and view.waiting_tokens < settings.budget_tokens


def _why_closed(view: GateView, held: float, group_tokens: float, limit: int) -> str:
    if held + group_tokens > limit:
        return f"full: open groups hold {held:.0f} of {limit} tokens"
    if held + view.unloaded_tokens + group_tokens > limit:
        return f"waiting for workers to load the weights that {view.unloaded_tokens} tokens made"
    return (
        f"waiting for the oldest group, which {view.overtaken_tokens} trained tokens have "
        f"overtaken; open groups hold {held:.0f} of {limit}"
    )
