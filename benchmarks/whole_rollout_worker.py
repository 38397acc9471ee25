"""A worker that sends a rollout once it has ended and nothing before: for comparison only.

``python -m benchmarks.whole_rollout_worker`` takes what ``python -m workers`` takes. It does what
systems do that keep a rollout in its engine until the end. No setting does: a change of version
has what is there of a rollout sent, however large ``worker.flush_tokens`` is.
"""

from __future__ import annotations

import sys

from workers.__main__ import main
from workers.buffers import LocalRollout, RolloutStore


def has_ended(
    self: RolloutStore, rollout: LocalRollout, flush_tokens: int, flush_s: float, now_s: float
) -> bool:
    """In the place of ``RolloutStore``'s rule of what is to be sent now."""
    if not rollout.sendable_tokens(self.held_version):
        return rollout.is_settled
    return rollout.finish is not None or bool(rollout.leaving)


if __name__ == "__main__":
    RolloutStore._is_due = has_ended  # type: ignore[method-assign]
    sys.exit(main())
