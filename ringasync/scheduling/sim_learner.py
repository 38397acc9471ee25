"""The simulated learner: batches of exactly the budget; what the simulation keeps account of."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

from ringasync.scheduling.sim_world import GroupEnd, SimGroup, SimRollout, World


@dataclass(frozen=True, slots=True)
class LearnerSettings:
    """Steps to do, seconds a step, share of complete groups filtered, and the reservation check.

    ``drop_stale`` ends groups above ``max_staleness`` at reservation, as the broker does; without
    it they are trained and only counted, which shows what the gate alone achieves. Without
    ``cut_to_budget`` a batch is everything that waits, as Algorithm 1 has it.
    """

    steps: int = 200
    step_s: float = 2.0
    filtered_share: float = 0.0
    max_staleness: int = 3
    drop_stale: bool = True
    cut_to_budget: bool = True


@dataclass(slots=True)
class RoundRecord:
    """One round: which groups became complete in it, and unfinished ones as (finished, size)."""

    completed: list[int] = field(default_factory=list)
    buffer: dict[int, tuple[int, int]] = field(default_factory=dict)
    counted_tokens: int = 0
    trained_tokens: int = 0


@dataclass(slots=True)
class SimResult:
    """What a simulation saw. Staleness histograms count trajectories (training) or groups."""

    steps: int = 0
    time_s: float = 0.0
    stalled: bool = False
    staleness_reserved: Counter[int] = field(default_factory=Counter)
    staleness_trained: Counter[int] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    max_open_tokens: int = 0
    """Most true tokens (full lengths) in open groups at any admission."""
    max_estimated_tokens: float = 0.0
    max_estimated_regular: float = 0.0
    """The same estimate, at admissions within the limit (not by the liveness rule)."""
    learner_wait_s: float = 0.0
    busy_slot_s: float = 0.0
    slots: int = 0
    trained_lengths: list[int] = field(default_factory=list)
    sampled_lengths: list[int] = field(default_factory=list)
    rounds: list[RoundRecord] = field(default_factory=list)
    max_pool: int = 0
    max_retention: int = 0
    """Highest retention of any trained rollout."""

    def note_admission(self, estimated_tokens: float, true_tokens: int, *, forced: bool) -> None:
        """Keep the largest backlog right after an admission; ``forced`` by the liveness rule."""
        self.max_estimated_tokens = max(self.max_estimated_tokens, estimated_tokens)
        self.max_open_tokens = max(self.max_open_tokens, true_tokens)
        if not forced:
            self.max_estimated_regular = max(self.max_estimated_regular, estimated_tokens)

    @property
    def stale_share(self) -> float:
        """Share of trained and stale tokens that went stale."""
        used = self.tokens["trained"] + self.tokens["masked"] + self.tokens["stale"]
        return self.tokens["stale"] / used if used else 0.0

    @property
    def slot_use(self) -> float:
        """Share of worker slots that were busy."""
        return self.busy_slot_s / (self.slots * self.time_s) if self.time_s else 0.0


class Learner:
    """Batches of exactly the budget, oldest ready first, surplus carried, shuffled inside."""

    def __init__(self, world: World, settings: LearnerSettings, budget_tokens: int) -> None:
        self.world, self.settings, self.budget = world, settings, budget_tokens
        self.result = SimResult(slots=sum(w.slots for w in world.workers))
        self.ready: deque[SimGroup] = deque()
        self.carried: deque[SimRollout] = deque()
        self.step = 0
        self.trained_total = 0
        self.ready_tokens = self.carried_tokens = 0
        self.busy = False
        self.idle_since = 0.0
        self.untrained: Counter[SimGroup] = Counter()
        self.batch_tokens = 0
        self.known_tokens = 0
        """Finished and untrained, in groups that have not ended."""
        self.flush = False

    @property
    def waiting_tokens(self) -> int:
        """Complete and untrained: ready groups and carried trajectories."""
        return self.ready_tokens + self.carried_tokens

    def complete(self, group: SimGroup) -> None:
        """All rollouts of the group have their verdict: ready, or filtered."""
        if self.world.rng.random() < self.settings.filtered_share:
            self.end(group, "filtered")
        else:
            self.ready.append(group)
            self.ready_tokens += group.num_tokens

    def end(self, group: SimGroup, how: GroupEnd) -> None:
        """Close the group's account."""
        group.end = how
        self.result.ends[how] += 1
        if how != "trained":
            self.result.tokens[how] += sum(r.tokens for r in group.rollouts)
            self.known_tokens -= sum(r.length for r in group.rollouts if r.graded)

    def reserve(self) -> list[SimRollout]:
        """A batch's trajectories, or nothing when the budget cannot be filled."""
        if self.waiting_tokens < self.budget and not self.flush:
            return []
        have = self.carried_tokens
        groups: list[SimGroup] = []
        while self.ready and (have < self.budget or not self.settings.cut_to_budget):
            group = self.ready.popleft()
            self.ready_tokens -= group.num_tokens
            age = self.step - group.first_step
            if self.settings.drop_stale and age > self.settings.max_staleness:
                self.end(group, "stale")
                continue
            groups.append(group)
            have += group.num_tokens
        if have == 0 or (have < self.budget and not self.flush):
            self.ready.extendleft(reversed(groups))
            self.ready_tokens += sum(group.num_tokens for group in groups)
            return []
        for group in groups:
            self.result.staleness_reserved[self.step - group.first_step] += 1
            self.untrained[group] = len(group.rollouts)
        fresh = [rollout for group in groups for rollout in group.rollouts]
        order = self.world.rng.permutation(len(fresh))
        batch = [*self.carried, *(fresh[i] for i in order)]
        self.carried.clear()
        return batch

    def start_step(self) -> bool:
        """Begin a step if a batch can be had; its end publishes the next version."""
        batch = self.reserve()
        if not batch:
            return False
        taken, tokens = 0, 0
        cut = self.settings.cut_to_budget
        while taken < len(batch) and (tokens < self.budget or not cut):
            tokens += batch[taken].length
            taken += 1
        self.carried.extend(batch[taken:])
        self.carried_tokens = sum(rollout.length for rollout in self.carried)
        for rollout in batch[:taken]:
            self.result.staleness_trained[self.step - rollout.first_step] += 1
            self.result.trained_lengths.append(rollout.length)
            self.result.max_retention = max(self.result.max_retention, rollout.retention)
        self.result.tokens["masked"] += max(0, tokens - self.budget) if cut else 0
        self.result.tokens["trained"] += min(tokens, self.budget) if cut else tokens
        self.batch_tokens = tokens
        self.result.learner_wait_s += self.world.now - self.idle_since
        self.busy = True
        self.world.at(self.settings.step_s, lambda: self._end_step(batch[:taken]))
        return True

    def _end_step(self, batch: list[SimRollout]) -> None:
        self.busy, self.idle_since = False, self.world.now
        self.step += 1
        self.trained_total += self.batch_tokens
        self.known_tokens -= self.batch_tokens
        for rollout in batch:
            self.untrained[rollout.group] -= 1
            if self.untrained[rollout.group] == 0:
                self.end(rollout.group, "trained")
        self.world.publish(self.step)

    @property
    def training_tokens(self) -> int:
        """Tokens of the batch in the step that runs, 0 between steps."""
        return self.batch_tokens if self.busy else 0

    def finish(self, *, stalled: bool) -> SimResult:
        """Close the books."""
        result = self.result
        result.steps, result.time_s, result.stalled = self.step, self.world.now, stalled
        result.ends["open"] = sum(1 for g in self.world.groups if not g.end)
        result.sampled_lengths = [r.length for g in self.world.groups for r in g.rollouts]
        return result


class SlotAccount:
    """Counts busy slots over time and the true tokens of open groups."""

    def __init__(self, learner: Learner) -> None:
        self.learner, self.last = learner, 0.0
        self.busy = 0

    def tick(self) -> None:
        world = self.learner.world
        self.learner.result.busy_slot_s += self.busy * (world.now - self.last)
        self.last = world.now

    def note(self) -> None:
        self.busy = sum(len(w.active) for w in self.learner.world.workers)
