"""Hundreds of simulated steps: staleness and backlog within their bounds, nothing starves."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from ringasync.scheduling.admission import GateSettings, admit
from ringasync.scheduling.sim_learner import LearnerSettings, SimResult
from ringasync.scheduling.sim_world import HeavyTail, LengthModel, WorldSettings
from ringasync.scheduling.simulation import GateRule, simulate_pipelined
from tests.scheduling.compare import compare, late_share

BUDGET = 6000
STEPS = 200


BALANCED = WorldSettings(workers=((50.0, 32), (50.0, 32)))
LOGNORMAL = HeavyTail("lognormal", 100.0, 1.0, 2000)


@dataclass(frozen=True)
class Scene:
    """One constellation of speeds and lengths."""

    world: WorldSettings = BALANCED
    step_s: float = 2.0
    lengths: LengthModel = LOGNORMAL
    filtered: float = 0.0


SCENES = {
    "balanced": Scene(),
    "slow-learner": Scene(step_s=10.0),
    "slow-workers": Scene(WorldSettings(workers=((10.0, 32), (5.0, 16))), step_s=1.0),
    "one-slow-of-three": Scene(WorldSettings(workers=((60.0, 32), (60.0, 32), (6.0, 32)))),
    "pareto": Scene(lengths=HeavyTail("pareto", 100.0, 1.3, 4000)),
    "growing": Scene(lengths=HeavyTail("lognormal", 40.0, 0.8, 2000, drift=6.0)),
    "shrinking": Scene(lengths=HeavyTail("lognormal", 240.0, 0.8, 2000, drift=0.2)),
    "groups-of-one": Scene(replace(BALANCED, group_size=1)),
    "groups-of-32": Scene(replace(BALANCED, group_size=32)),
    "mostly-filtered": Scene(filtered=0.7),
    "failing-workers": Scene(replace(BALANCED, failures_per_s=0.05, repair_s=4.0)),
    "slow-swaps": Scene(replace(BALANCED, swap_s=3.0)),
}


def simulate(
    scene: Scene,
    max_staleness: int,
    *,
    weight: float = 0.25,
    drop_stale: bool = True,
    seed: int = 0,
    steps: int = STEPS,
    rule: GateRule = admit,
) -> SimResult:
    learner = LearnerSettings(
        steps, scene.step_s, scene.filtered, max_staleness, drop_stale=drop_stale
    )
    gate = GateSettings(BUDGET, max_staleness, scene.world.group_size, weight)
    return simulate_pipelined(
        scene.world, learner, gate, scene.lengths, prior_tokens=400.0, seed=seed, rule=rule
    )


@pytest.mark.parametrize("max_staleness", [0, 3])
@pytest.mark.parametrize("name", SCENES)
def test_bounds_hold_and_nothing_starves(name: str, max_staleness: int) -> None:
    scene = SCENES[name]
    result = simulate(scene, max_staleness)
    limit = (max_staleness + 1) * BUDGET
    assert not result.stalled
    assert result.steps >= STEPS
    assert result.ends["open"] == 0  # every admitted group came to an end
    assert max(result.staleness_reserved) <= max_staleness
    assert max(result.staleness_trained) <= max_staleness + 1  # carried surplus only
    assert result.max_estimated_regular <= limit
    group = scene.world.group_size * 400.0
    assert result.max_estimated_tokens <= max(limit, BUDGET + group)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("step_s", [1.0, 4.0])
def test_the_bound_of_admission_alone_with_true_estimates(seed: int, step_s: float) -> None:
    # Weight 1, equal lengths (so E = 0), nothing dropped: what the gate's docstring proves.
    def equal(_rng: np.random.Generator, _group: int, size: int) -> list[int]:
        return [100] * size

    workers = ((50.0, 16), (7.0, 24), (20.0, 8))  # a rollout takes 2 to 14 s
    scene = Scene(WorldSettings(workers=workers, failures_per_s=0.02), step_s, equal)
    learner = LearnerSettings(STEPS, step_s, 0.0, 2, drop_stale=False)
    gate = GateSettings(BUDGET, 2, 8, 1.0)
    result = simulate_pipelined(scene.world, learner, gate, equal, prior_tokens=100.0, seed=seed)
    assert not result.stalled
    assert max(result.staleness_reserved) <= 2
    assert max(result.staleness_trained) <= 3
    assert result.max_open_tokens <= 3 * BUDGET


@pytest.mark.parametrize(
    ("name", "share"), [("balanced", 0.25), ("slow-learner", 0.25), ("slow-workers", 0.25)]
)
def test_overtaking_weight_trades_stale_tokens_for_waiting(name: str, share: float) -> None:
    loose, strict = (simulate(SCENES[name], 3, weight=weight, steps=150) for weight in (0.0, 1.0))
    assert strict.stale_share < share * loose.stale_share
    assert strict.stale_share < 0.06
    bias = np.mean(strict.trained_lengths) / np.mean(strict.sampled_lengths)
    loose_bias = np.mean(loose.trained_lengths) / np.mean(loose.sampled_lengths)
    assert loose_bias < bias <= 1.01


def test_moderate_tails_cost_little_at_the_default() -> None:
    # Like the demo: 96 tokens at most, two workers, a step as long as a generation.
    scene = Scene(
        WorldSettings(workers=((40.0, 64), (40.0, 64)), swap_s=0.15),
        1.5,
        HeavyTail("lognormal", 50.0, 0.6, 96),
    )
    result = simulate(scene, 3)
    assert result.stale_share < 0.03
    assert np.mean(result.trained_lengths) > 0.98 * np.mean(result.sampled_lengths)


def test_the_backlog_in_truth_stays_near_the_limit_even_under_heavy_tails() -> None:
    for name in ("balanced", "pareto", "growing"):
        result = simulate(SCENES[name], 3, steps=100)
        assert result.max_open_tokens <= 1.75 * 4 * BUDGET, name


def test_the_designs_rule_alone_is_not_enough_and_ours_is_better() -> None:
    # With the learner as the slower side nearly everything is one step too old: the freed room is
    # filled before the workers have the weights that freed it.
    scene = "like the demo, learner slower"
    alone, ours = (
        compare(scene, rule, drop_stale=False, steps=100)
        for rule in ("design's rule alone", "weight 0.25 (default)")
    )
    assert late_share(alone) > 0.5
    assert late_share(ours) < 0.1
    assert ours.steps / ours.time_s > 0.97 * alone.steps / alone.time_s


def test_a_seed_gives_one_history() -> None:
    a, b, c = (simulate(SCENES["pareto"], 3, seed=seed, steps=40) for seed in (1, 1, 2))
    assert (a.time_s, a.tokens) == (b.time_s, b.tokens)
    assert a.time_s != c.time_s
