"""Staleness in learner steps, counted through the fork point after a restart."""

from __future__ import annotations

from collections.abc import Mapping


def version_ages(version_steps: Mapping[int, tuple[int, int]], learner_step: int) -> dict[int, int]:
    """Age in learner steps of each policy version at ``learner_step``.

    ``version_steps`` maps a version to (learner step, fork step). When a later version forked off
    at an earlier step than a version was made at, the way to now leads back to that fork: with f
    the smallest such fork step, age = (step - f) + (now - f). Never negative.
    """
    ages: dict[int, int] = {}
    fork = learner_step
    for version in sorted(version_steps, reverse=True):
        step, fork_step = version_steps[version]
        meeting = min(step, fork)
        ages[version] = (step - meeting) + (learner_step - meeting)
        fork = min(fork, fork_step)
    return ages
