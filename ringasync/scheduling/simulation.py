"""Drives the real gate and the real rounds over hundreds of learner steps, without any engine.

``simulate_pipelined`` and ``simulate_rounds`` return what happened: staleness at reservation and at
training, open tokens at each admission, how groups ended, learner waiting, worker idling. Used by
the tests, and to choose settings for a length distribution before a long run.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field

from ringasync.scheduling.admission import GateSettings, GateView, admit
from ringasync.scheduling.length_estimate import LengthEstimate
from ringasync.scheduling.rounds import RoundSettings, RoundState, RoundView, next_action, to_purge
from ringasync.scheduling.sim_world import (
    LengthModel,
    SimGroup,
    SimRollout,
    World,
    WorldSettings,
)


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
    min_pool_in_round: int = 1 << 62
    max_pool: int = 0

    @property
    def stale_share(self) -> float:
        """Share of trained and stale tokens that went stale."""
        used = self.tokens["trained"] + self.tokens["masked"] + self.tokens["stale"]
        return self.tokens["stale"] / used if used else 0.0

    @property
    def slot_use(self) -> float:
        """Share of worker slots that were busy."""
        return self.busy_slot_s / (self.slots * self.time_s) if self.time_s else 0.0


class _Learner:
    """Batches of exactly the budget, oldest ready first, surplus carried, shuffled inside."""

    def __init__(self, world: World, settings: LearnerSettings, budget_tokens: int) -> None:
        self.world, self.settings, self.budget = world, settings, budget_tokens
        self.result = SimResult(slots=sum(w.slots for w in world.workers))
        self.ready: deque[SimGroup] = deque()
        self.carried: deque[SimRollout] = deque()
        self.step = 0
        self.trained_total = 0
        self.trained_at_step = [0]
        self.busy = False
        self.idle_since = 0.0
        self.untrained: Counter[SimGroup] = Counter()
        self.batch_tokens = 0
        self.flush = False

    @property
    def waiting_tokens(self) -> int:
        """Complete and untrained: ready groups and carried trajectories."""
        return sum(g.num_tokens for g in self.ready) + sum(r.length for r in self.carried)

    def complete(self, group: SimGroup) -> None:
        """All rollouts of the group have their verdict: ready, or filtered."""
        if self.world.rng.random() < self.settings.filtered_share:
            self.end(group, "filtered")
        else:
            self.ready.append(group)

    def end(self, group: SimGroup, how: str) -> None:
        group.end = how  # type: ignore[assignment]
        self.result.ends[how] += 1
        if how != "trained":
            self.result.tokens[how] += sum(r.tokens for r in group.rollouts)

    def reserve(self) -> list[SimRollout]:
        """A batch's trajectories, or nothing when the budget cannot be filled."""
        have = sum(r.length for r in self.carried)
        groups: list[SimGroup] = []
        while self.ready and (have < self.budget or not self.settings.cut_to_budget):
            group = self.ready.popleft()
            age = self.step - group.first_step
            if self.settings.drop_stale and age > self.settings.max_staleness:
                self.end(group, "stale")
                continue
            groups.append(group)
            have += group.num_tokens
        if have == 0 or (have < self.budget and not self.flush):
            self.ready.extendleft(reversed(groups))
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
        for rollout in batch[:taken]:
            self.result.staleness_trained[self.step - rollout.first_step] += 1
            self.result.trained_lengths.append(rollout.length)
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
        self.trained_at_step.append(self.trained_total)
        for rollout in batch:
            self.untrained[rollout.group] -= 1
            if self.untrained[rollout.group] == 0:
                self.end(rollout.group, "trained")
        self.world.publish(self.step)

    @property
    def training_tokens(self) -> int:
        """Tokens of the batch in the step that runs, 0 between steps."""
        return self.batch_tokens if self.busy else 0

    @property
    def unloaded_tokens(self) -> int:
        """Tokens trained into versions that the slowest living worker has not loaded yet."""
        loaded = min((w.loaded_step for w in self.world.workers if w.alive), default=self.step)
        return self.trained_total - self.trained_at_step[loaded]

    def finish(self, *, stalled: bool) -> SimResult:
        """Close the books."""
        result = self.result
        result.steps, result.time_s, result.stalled = self.step, self.world.now, stalled
        result.ends["open"] = sum(1 for g in self.world.groups if not g.end)
        result.sampled_lengths = [r.length for g in self.world.groups for r in g.rollouts]
        return result


class _Account:
    """Counts busy slots over time and the true tokens of open groups."""

    def __init__(self, learner: _Learner) -> None:
        self.learner, self.last = learner, 0.0
        self.busy = 0

    def tick(self) -> None:
        world = self.learner.world
        self.learner.result.busy_slot_s += self.busy * (world.now - self.last)
        self.last = world.now

    def note(self) -> None:
        self.busy = sum(len(w.active) for w in self.learner.world.workers)


def simulate_pipelined(
    world_settings: WorldSettings,
    learner_settings: LearnerSettings,
    gate: GateSettings,
    lengths: LengthModel,
    *,
    prior_tokens: float,
    seed: int = 0,
    drain: bool = True,
) -> SimResult:
    """Run the pipelined schedule for ``learner_settings.steps`` steps under the real gate.

    With ``drain`` feeding then stops and everything admitted is carried to its end; a group that
    is still open afterwards (``ends['open']``) starved. ``stalled`` is set when nothing can happen
    any more before the steps are done: a deadlock.
    """
    world = World(world_settings, lengths, seed)
    learner = _Learner(world, learner_settings, gate.budget_tokens)
    estimate = LengthEstimate(prior_tokens)
    unfinished: OrderedDict[int, SimGroup] = OrderedDict()
    known = Counter[SimGroup]()

    def on_graded(rollout: SimRollout) -> None:
        known[rollout.group] += rollout.length
        if rollout.group.graded == len(rollout.group.rollouts):
            del unfinished[rollout.group.index]
            estimate.observe([r.length for r in rollout.group.rollouts])
            learner.complete(rollout.group)

    def feed() -> None:
        for group in [g for g in known if g.end]:
            del known[group]
        oldest = next(iter(unfinished.values()), None)
        view = GateView(
            known_tokens=sum(known.values()),
            unfinished_rollouts=world.unfinished + world.grading,
            waiting_tokens=learner.waiting_tokens + learner.training_tokens,
            running=world.unfinished + world.grading,
            unloaded_tokens=learner.unloaded_tokens,
            overtaken_tokens=learner.trained_total - oldest.trained_at_admission if oldest else 0,
        )
        decision = admit(view, gate, estimate.mean_tokens)
        if decision.groups == 0:
            return
        result = learner.result
        for _ in range(decision.groups):
            group = world.admit(learner.trained_total)
            unfinished[group.index] = group
        added = decision.groups * gate.group_size * estimate.mean_tokens
        result.max_estimated_tokens = max(result.max_estimated_tokens, decision.open_tokens + added)
        if not decision.reason.startswith("nothing runs"):
            result.max_estimated_regular = max(
                result.max_estimated_regular, decision.open_tokens + added
            )
        held = sum(g.num_tokens for g in known) + sum(
            g.num_tokens for g in unfinished.values() if g not in known
        )
        result.max_open_tokens = max(result.max_open_tokens, held)

    world.on_graded = on_graded
    account = _Account(learner)
    feed()
    while True:
        if learner.step < learner_settings.steps and not learner.busy:
            learner.start_step()
        if learner.step < learner_settings.steps:
            feed()
        elif not drain:
            return learner.finish(stalled=False)
        else:
            learner.flush = world.unfinished + world.grading == 0
            if not learner.busy and not learner.start_step() and learner.flush:
                return learner.finish(stalled=False)
        world.lease()
        account.note()
        if not world.advance():
            return learner.finish(stalled=learner.step < learner_settings.steps)
        account.tick()


def simulate_rounds(
    world_settings: WorldSettings,
    learner_settings: LearnerSettings,
    rounds: RoundSettings,
    lengths: LengthModel,
    *,
    retention_max: int | None = None,
    seed: int = 0,
) -> SimResult:
    """Run Algorithm 1 for ``learner_settings.steps`` rounds under the real round machine.

    Purge is ``drop_group``. Groups are never dropped as stale: sigma is what bounds age here.
    """
    world = World(world_settings, lengths, seed)
    learner = _Learner(world, learner_settings, rounds.budget_tokens)
    learner.flush = True
    sim = _Rounds(world, learner, rounds, retention_max)
    world.on_graded = sim.on_graded
    account = _Account(learner)
    while len(learner.result.rounds) <= learner_settings.steps:
        sim.act()
        if world.accepting:
            world.lease()
        account.note()
        if sim.round_id > learner_settings.steps:
            break
        if not world.advance():
            return learner.finish(stalled=True)
        account.tick()
    return learner.finish(stalled=False)


class _Rounds:
    """Applies the round machine's actions to the simulated world."""

    def __init__(
        self, world: World, learner: _Learner, settings: RoundSettings, sigma: int | None
    ) -> None:
        self.world, self.learner, self.settings, self.sigma = world, learner, settings, sigma
        self.round_id = 0
        self.state: RoundState = "none"
        self.completed_tokens = 0
        self.generated_before = 0
        self.record = RoundRecord()

    def on_graded(self, rollout: SimRollout) -> None:
        self.completed_tokens += rollout.length
        group = rollout.group
        if group.graded == len(group.rollouts) and not group.end:
            self.record.completed.append(group.index)
            self.learner.complete(group)

    def view(self) -> RoundView:
        return RoundView(
            round_id=self.round_id,
            state=self.state,
            pool=self.world.unfinished,
            grading=self.world.grading,
            waiting_tokens=self.learner.waiting_tokens,
            completed_tokens=self.completed_tokens,
            generated_tokens=self.world.generated - self.generated_before,
        )

    def act(self) -> None:
        """Act until the machine waits."""
        while True:
            if self.state == "training" and not self.learner.busy:
                self.state = "none"
            action = next_action(self.view(), self.settings)
            if action.kind == "purge_and_open":
                self._open(action.round_id)
                if self.round_id > self.learner.settings.steps:
                    return
            elif action.kind == "feed":
                for _ in range(action.groups):
                    self.world.admit(self.learner.trained_total)
                self.learner.result.max_pool = max(
                    self.learner.result.max_pool, self.world.unfinished
                )
            elif action.kind == "close":
                self._close()
            elif action.kind == "to_training":
                self._train()
            else:
                return

    def _open(self, round_id: int) -> None:
        groups = {str(g.index): g for g in self.world.groups if not g.end}
        worst = {
            name: max((r.retention for r in g.rollouts if not r.finished), default=0)
            for name, g in groups.items()
        }
        for name in to_purge(worst, self.sigma):
            self.world.drop(groups[name])
            self.learner.end(groups[name], "purged")
        self.round_id, self.state = round_id, "open"
        self.completed_tokens, self.generated_before = 0, self.world.generated
        self.record = RoundRecord()
        self.world.accepting = True

    def _close(self) -> None:
        self.world.park_all()
        self.record.counted_tokens = self.completed_tokens
        self.state = "closing"

    def _train(self) -> None:
        self.record.buffer = {
            g.index: (g.graded, len(g.rollouts))
            for g in self.world.groups
            if not g.end and g.graded < len(g.rollouts)
        }
        self.learner.result.rounds.append(self.record)
        self.state = "training"
        if self.learner.start_step():
            self.record.trained_tokens = self.learner.batch_tokens
