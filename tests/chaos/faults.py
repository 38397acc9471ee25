"""What is done to a run: kinds of faults, and the seeded order in which they come. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

SESSION_TTL_S = 3.0
"""Lease of every session and lock of a chaos run; what lasts longer makes a zombie."""


@dataclass(frozen=True, slots=True)
class Fault:
    """``after_s`` after the one before, ``kind`` happens to ``target`` and lasts ``lasts_s``.

    ``size`` is a clock's jump in seconds, or how long each chunk of bytes is held up.
    """

    number: int
    kind: str
    target: str
    after_s: float
    lasts_s: float = 0.0
    size: float = 0.0

    def __str__(self) -> str:
        lasts = f" for {self.lasts_s:.1f} s" if self.lasts_s else ""
        size = f" ({self.size:+.3g} s)" if self.size else ""
        return f"{self.number}: {self.kind} {self.target}{size}{lasts}"


@dataclass(frozen=True, slots=True)
class Kind:
    """How often a pair of kind and target comes in one deck, and within which bounds it lasts."""

    kind: str
    target: str
    count: int
    lasts_s: tuple[float, float] = (0.0, 0.0)
    size: tuple[float, float] = (0.0, 0.0)


PAST_LEASE_S = (1.3 * SESSION_TTL_S, 2.0 * SESSION_TTL_S)
DECK = (
    Kind("kill", "worker", 12),
    Kind("kill", "grader", 5),
    Kind("kill", "coordinator", 3),
    Kind("kill", "learner", 2),
    Kind("zombie", "worker", 4, PAST_LEASE_S),
    Kind("zombie", "grader", 2, PAST_LEASE_S),
    Kind("zombie", "coordinator", 1, PAST_LEASE_S),
    Kind("zombie", "learner", 1, PAST_LEASE_S),
    Kind("kill", "redis", 3),
    Kind("stop", "redis", 3, (0.3, 2.0)),
    Kind("full", "redis", 2, (0.5, 2.0)),
    Kind("cut", "worker", 4),
    Kind("cut", "any", 3),
    Kind("delay", "worker", 3, (0.5, 3.0), (0.01, 0.2)),
    Kind("partition", "worker", 2, PAST_LEASE_S),
    Kind("partition", "any", 1, (0.3, 2.0)),
    Kind("disk", "redis", 1, (1.0, 2.0)),
    Kind("disk", "learner", 1, (1.0, 2.0)),
    Kind("clock", "redis", 2, (2.0, 4.0), (-300.0, 300.0)),
    Kind("clock", "coordinator", 1, (3.0, 5.0), (-300.0, 300.0)),
)
"""One deck holds each as often as its count says; decks are shuffled one after the other, so that
a run of a few dozen faults has met every kind."""

DECK_SIZE = sum(kind.count for kind in DECK)
PAUSE_S = (0.1, 1.2)


def schedule(seed: int) -> Iterator[Fault]:
    """Faults without end; the same for the same seed."""
    draw = random.Random(seed)
    number = 0
    while True:
        deck = [kind for kind in DECK for _ in range(kind.count)]
        draw.shuffle(deck)
        for kind in deck:
            number += 1
            after_s, lasts_s = draw.uniform(*PAUSE_S), draw.uniform(*kind.lasts_s)
            yield Fault(number, kind.kind, kind.target, after_s, lasts_s, draw.uniform(*kind.size))
