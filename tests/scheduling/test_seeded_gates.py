"""Tests of the test: a gate that forgets part of what is open is found by the simulation."""

from __future__ import annotations

from dataclasses import replace

from ringasync.scheduling.admission import Admission, GateSettings, GateView, admit
from ringasync.scheduling.sim_learner import SimResult
from ringasync.scheduling.simulation import GateRule
from tests.scheduling.test_simulation import BUDGET, SCENES, simulate

STALENESS = 3
LIMIT = (STALENESS + 1) * BUDGET


def slow_learner(rule: GateRule) -> SimResult:
    """A learner that is slower than its workers: only the gate holds the backlog."""
    return simulate(SCENES["slow-learner"], STALENESS, steps=25, rule=rule)


def forgets_graded(view: GateView, settings: GateSettings, mean: float) -> Admission:
    """Counts only what still generates."""
    return admit(replace(view, known_tokens=0), settings, mean)


def test_the_right_gate_keeps_the_backlog_and_little_goes_stale() -> None:
    result = slow_learner(admit)
    assert result.max_open_tokens < 1.4 * LIMIT
    assert result.stale_share < 0.1


def test_a_gate_that_forgets_graded_groups_is_found() -> None:
    result = slow_learner(forgets_graded)
    assert result.max_open_tokens > 1.4 * LIMIT
    assert result.stale_share > 0.1
