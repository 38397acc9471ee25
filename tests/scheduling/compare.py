"""Gates side by side: ``python -m tests.scheduling.compare`` prints docs/scheduling.md's table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from ringasync.scheduling.admission import Admission, GateSettings, GateView, admit
from ringasync.scheduling.sim_learner import LearnerSettings, SimResult
from ringasync.scheduling.sim_world import HeavyTail, LengthModel, WorldSettings
from ringasync.scheduling.simulation import simulate_pipelined

Rule = Callable[[GateView, GateSettings, float], Admission]

LIKE_DEMO = WorldSettings(workers=((40.0, 64), (40.0, 64)), swap_s=0.15, grading_s=0.1)
TWO_FAST = WorldSettings(workers=((50.0, 32), (50.0, 32)))
SHORT = HeavyTail("lognormal", 50.0, 0.6, 96)
LONG_TAIL = HeavyTail("lognormal", 100.0, 1.0, 2000)
SCENES: dict[str, tuple[WorldSettings, LengthModel, float]] = {
    "like the demo, workers slower": (LIKE_DEMO, SHORT, 0.8),
    "like the demo, learner slower": (LIKE_DEMO, SHORT, 3.0),
    "long tail, balanced": (TWO_FAST, LONG_TAIL, 2.0),
    "long tail, learner slower": (TWO_FAST, LONG_TAIL, 8.0),
}


def literal(view: GateView, settings: GateSettings, mean: float) -> Admission:
    """The design's rule to the letter: known lengths, else the running mean; nothing else."""
    guessed = round(view.unfinished_rollouts * mean)
    bare = dataclasses.replace(
        view,
        known_tokens=view.known_tokens + guessed,
        unfinished_rollouts=0,
        unfinished_tokens=0,
        unloaded_tokens=0,
        overtaken_tokens=0,
    )
    return admit(bare, settings, mean)


RULES: dict[str, tuple[Rule, float]] = {
    "design's rule alone": (literal, 0.0),
    "weight 0": (admit, 0.0),
    "weight 0.25 (default)": (admit, 0.25),
    "weight 1": (admit, 1.0),
}


def compare(scene: str, rule: str, *, drop_stale: bool, steps: int = 200) -> SimResult:
    """One cell of the table: max_staleness 3, budget 6,000 tokens, groups of 8."""
    world, lengths, step_s = SCENES[scene]
    gate_rule, weight = RULES[rule]
    return simulate_pipelined(
        world,
        LearnerSettings(steps, step_s, 0.0, 3, drop_stale=drop_stale),
        GateSettings(6000, 3, 8, weight),
        lengths,
        prior_tokens=400.0,
        rule=gate_rule,
    )


def late_share(result: SimResult, max_staleness: int = 3) -> float:
    """Share of trained trajectories that were older than they should be."""
    late = sum(n for age, n in result.staleness_trained.items() if age > max_staleness)
    return late / sum(result.staleness_trained.values())


def main() -> None:
    """Print the table as Markdown."""
    print("| scene | gate | oldest | too old | backlog | stale | length | steps/s |")
    print("|---|---|---|---|---|---|---|---|")
    for scene in SCENES:
        for rule in RULES:
            kept, dropped = (compare(scene, rule, drop_stale=drop) for drop in (False, True))
            bias = np.mean(dropped.trained_lengths) / np.mean(dropped.sampled_lengths)
            print(
                f"| {scene} | {rule} | {max(kept.staleness_trained)} | {late_share(kept):.1%} "
                f"| {kept.max_open_tokens / 24000:.2f} | {dropped.stale_share:.1%} "
                f"| {bias:.2f} | {dropped.steps / dropped.time_s:.2f} |"
            )


if __name__ == "__main__":
    main()
