"""States of rollouts and groups, ledger accounts, and the moves that are legal.

::

    rollout:  queued -> leased -> finished -> grading -> graded
                ^  ^      |  |        ^          |
                |  |      |  v        '-- retry -+--> grade_error
                |  +------+ parked (resumable)
                '-- no token flushed

    group:  open -> ready -> reserved -> taken -> trained
              |       |
              |       +-> filtered (zero variance) | stale
              +-> purged | quarantined | grade_error | evaluated
"""

from __future__ import annotations

from enum import StrEnum


class RolloutState(StrEnum):
    """Where one rollout is in its life; terminal states follow the group's."""

    QUEUED = "queued"
    LEASED = "leased"
    PARKED = "parked"
    FINISHED = "finished"
    GRADING = "grading"
    GRADED = "graded"
    GRADE_ERROR = "grade_error"


class GroupState(StrEnum):
    """Where one group (all rollouts of a prompt) is in its life."""

    OPEN = "open"
    READY = "ready"
    RESERVED = "reserved"
    TAKEN = "taken"
    TRAINED = "trained"
    FILTERED = "filtered"
    STALE = "stale"
    PURGED = "purged"
    QUARANTINED = "quarantined"
    GRADE_ERROR = "grade_error"
    EVALUATED = "evaluated"
    LOST = "lost"


class Account(StrEnum):
    """Ledger accounts. Every accepted policy token is in exactly one of them."""

    OPEN = "open"
    FINISHED = "finished"
    GRADED = "graded"
    TAKEN = "taken"
    TRAINED = "trained"
    MASKED = "masked"
    FILTERED = "filtered"
    STALE = "stale"
    PURGED = "purged"
    QUARANTINED = "quarantined"
    GRADE_ERROR = "grade_error"
    EVAL = "eval"
    LOST = "lost"


LIVE_ACCOUNTS = (Account.OPEN, Account.FINISHED, Account.GRADED, Account.TAKEN)
"""Accounts that ``audit`` recomputes from the records; the others count what has left Redis."""


class FinishReason(StrEnum):
    """Why a rollout ended by itself."""

    STOP = "stop"
    LENGTH = "length"


class Phase(StrEnum):
    """A run's phase: ``finishing`` admits no new prompts, ``done`` lets every role exit."""

    RUNNING = "running"
    FINISHING = "finishing"
    DONE = "done"
