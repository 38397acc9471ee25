"""Drives the real gate and the real rounds over hundreds of learner steps, without any engine.

``simulate_pipelined`` and ``simulate_rounds`` return what happened: staleness at reservation and at
training, open tokens at each admission, how groups ended, learner waiting, worker idling. Used by
the tests, and to choose settings for a length distribution before a long run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ringasync.scheduling.admission import Admission, GateSettings, GateView, admit
from ringasync.scheduling.lag import OvertakingTracker, VersionLag
from ringasync.scheduling.length_estimate import LengthEstimate
from ringasync.scheduling.rounds import RoundSettings, RoundState, RoundView, next_action, to_purge
from ringasync.scheduling.sim_learner import (
    Learner,
    LearnerSettings,
    RoundRecord,
    SimResult,
    SlotAccount,
)
from ringasync.scheduling.sim_world import LengthModel, SimGroup, SimRollout, World, WorldSettings

__all__ = ["LearnerSettings", "RoundRecord", "SimResult", "simulate_pipelined", "simulate_rounds"]


GateRule = Callable[[GateView, GateSettings, float], Admission]


def simulate_pipelined(
    world_settings: WorldSettings,
    learner_settings: LearnerSettings,
    gate: GateSettings,
    lengths: LengthModel,
    *,
    prior_tokens: float,
    seed: int = 0,
    drain: bool = True,
    rule: GateRule = admit,
) -> SimResult:
    """Run the pipelined schedule for ``learner_settings.steps`` steps under the real gate.

    With ``drain`` feeding then stops and everything admitted is carried to its end; a group that
    is still open afterwards (``ends['open']``) starved. ``stalled`` is set when nothing can happen
    any more before the steps are done: a deadlock. ``rule`` may be another gate, to compare.
    """
    sim = _Pipelined(World(world_settings, lengths, seed), learner_settings, gate, prior_tokens)
    sim.rule = rule
    learner, world = sim.learner, sim.world
    account = SlotAccount(learner)
    sim.feed()
    while True:
        training = learner.step < learner_settings.steps
        if training:
            if not learner.busy:
                learner.start_step()
            sim.feed()
        elif not drain or sim.drained():
            return learner.finish(stalled=False)
        world.lease()
        account.note()
        if not world.advance():
            return learner.finish(stalled=learner.step < learner_settings.steps)
        account.tick()


class _Pipelined:
    """The real gate, estimate and trackers over the simulated world."""

    def __init__(
        self, world: World, settings: LearnerSettings, gate: GateSettings, prior_tokens: float
    ) -> None:
        self.world, self.gate = world, gate
        self.rule: GateRule = admit
        self.learner = Learner(world, settings, gate.budget_tokens)
        self.estimate = LengthEstimate(prior_tokens)
        self._overtaking, self._lag = OvertakingTracker(), VersionLag()
        self._unfinished: dict[str, SimGroup] = {}
        world.on_graded = self._on_graded

    def _on_graded(self, rollout: SimRollout) -> None:
        group = rollout.group
        self.learner.known_tokens += rollout.length
        if group.graded == len(group.rollouts):
            del self._unfinished[str(group.index)]
            self._overtaking.complete(str(group.index))
            self.estimate.observe([r.length for r in group.rollouts])
            self.learner.complete(group)

    def _view(self) -> GateView:
        world, learner = self.world, self.learner
        trained = learner.trained_total
        loaded = [worker.loaded_step + 1 for worker in world.workers if worker.alive]
        return GateView(
            known_tokens=learner.known_tokens,
            unfinished_rollouts=world.unfinished + world.grading,
            unfinished_tokens=world.unfinished_tokens(),
            waiting_tokens=learner.waiting_tokens + learner.training_tokens,
            running=world.unfinished + world.grading,
            overtaken_tokens=self._overtaking.overtaken_tokens(trained),
            unloaded_tokens=self._lag.unloaded_tokens(
                trained_tokens=trained,
                latest_version=world.published_step + 1,
                worker_versions=loaded,
                pinned=False,
                now_s=world.now,
            ),
        )

    def feed(self) -> None:
        """Ask the gate and admit what it says."""
        view = self._view()
        decision = self.rule(view, self.gate, self.estimate.mean_tokens)
        if decision.groups == 0:
            return
        for _ in range(decision.groups):
            group = self.world.admit()
            self._unfinished[str(group.index)] = group
            loaded = self.learner.trained_total - view.unloaded_tokens
            self._overtaking.admitted([str(group.index)], loaded)
        added = decision.groups * self.gate.group_size * self.estimate.mean_tokens
        forced = decision.reason.startswith("nothing runs")
        unfinished = (r for g in self._unfinished.values() for r in g.rollouts if not r.graded)
        held = self.learner.known_tokens + sum(r.length for r in unfinished)
        self.learner.result.note_admission(decision.open_tokens + added, held, forced=forced)

    def drained(self) -> bool:
        """After the last step: True once everything admitted has come to its end."""
        learner = self.learner
        learner.flush = self.world.unfinished + self.world.grading == 0
        return not learner.busy and not learner.start_step() and learner.flush


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
    learner = Learner(world, replace(learner_settings, drop_stale=False), rounds.budget_tokens)
    learner.flush = True
    sim = _Rounds(world, learner, rounds, retention_max)
    world.on_graded = sim.on_graded
    account = SlotAccount(learner)
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
        self, world: World, learner: Learner, settings: RoundSettings, sigma: int | None
    ) -> None:
        self.world, self.learner, self.settings, self.sigma = world, learner, settings, sigma
        self.round_id = 0
        self.state: RoundState = "none"
        self.completed_tokens = 0
        self.generated_before = 0
        self.record = RoundRecord()

    def on_graded(self, rollout: SimRollout) -> None:
        self.completed_tokens += rollout.length
        self.learner.known_tokens += rollout.length
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
                    self.world.admit()
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
