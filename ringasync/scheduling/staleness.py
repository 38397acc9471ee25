"""Staleness in learner steps; the function lives with the records: the broker needs it too."""

from ringasync.records.versions import staleness_steps

__all__ = ["staleness_steps"]
