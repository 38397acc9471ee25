"""How old a token is, in learner steps, through the fork points that restarts leave."""

from __future__ import annotations

from collections.abc import Mapping


def staleness_steps(
    version: int, steps: Mapping[int, tuple[int, int]], learner_step: int
) -> int | None:
    """Learner steps between the weights that sampled a token and the learner's weights now.

    ``steps`` maps every known version to (learner step, fork step), where the fork step is that of
    the checkpoint from which the learner's life that published it began. The present life is
    the newest version's. A version at step s on the present line is ``learner_step - s`` old; one
    published above a fork point m at which its line was abandoned lies off the line, and its
    distance goes down to the fork and up again: ``(s - m) + (learner_step - m)``.
    A version that Redis lost the announcement of counts as the next older known one; None when
    there is none. Never negative.
    """
    version = max((known for known in steps if known <= version), default=0)
    if version not in steps:
        return None
    step, fork = steps[version]
    fork_point = step
    previous = (step, fork)
    for later in sorted(number for number in steps if number > version):
        later_step, later_fork = steps[later]
        if later_fork != previous[1] or later_step <= previous[0]:  # another life of the learner
            fork_point = min(fork_point, later_fork)
        previous = (later_step, later_fork)
    return max(0, step - fork_point) + max(0, learner_step - fork_point)
