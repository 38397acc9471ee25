"""A schedule: what goes wrong in a simulated run, and at which step. Data, so that it shrinks."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from hypothesis import strategies as st

Kind = Literal["crash_before", "crash_after", "hold", "late_answer", "repeat", "cut", "jump",
               "rollback"]  # fmt: skip
KINDS: tuple[Kind, ...] = get_args(Kind)
MAX_STEP = 800
"""A run without faults has about so many steps."""


@dataclass(frozen=True, order=True)
class Fault:
    """At step ``step`` (a command to Redis, or work in a thread) something happens to its role.

    ``crash_before``, ``crash_after``: the role is killed before or after the step's effect, and
    starts again ``ms`` later. ``hold``: the step takes place ``ms`` later. ``late_answer``: its
    effect is at once, the answer comes ``ms`` later. ``repeat``: the answer is lost and the command
    sent again ``ms`` later. ``cut``: the role cannot reach Redis for ``ms``. ``jump``: Redis' clock
    jumps ``ms`` ahead. ``rollback``: Redis loses what the last ``ms`` steps wrote.
    """

    step: int
    kind: Kind
    ms: int

    def __str__(self) -> str:
        unit = "steps" if self.kind == "rollback" else "ms"
        return f"step {self.step}: {self.kind} ({self.ms} {unit})"


@dataclass(frozen=True)
class Schedule:
    """``jitter`` 0: every step takes the same time; else steps take times drawn from it."""

    mode: Literal["pipelined", "rounds"] = "pipelined"
    jitter: int = 0
    faults: tuple[Fault, ...] = ()

    def to_json(self) -> str:
        """One line that ``from_json`` reads."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """Read ``to_json``'s line."""
        fields = json.loads(text)
        faults = tuple(Fault(**fault) for fault in fields["faults"])
        return cls(fields["mode"], fields["jitter"], faults)

    def lines(self) -> list[str]:
        """For people."""
        return [f"{self.mode}, jitter {self.jitter}", *(f"  {fault}" for fault in self.faults)]


_MS = st.sampled_from([5, 40, 300, 900, 2500])


def schedules(max_faults: int = 24, *, rollbacks: bool = False) -> st.SearchStrategy[Schedule]:
    """Schedules of up to ``max_faults`` faults; without ``rollbacks`` Redis forgets nothing."""
    kinds = [kind for kind in KINDS if rollbacks or kind != "rollback"]
    faults = st.builds(Fault, st.integers(0, MAX_STEP), st.sampled_from(kinds), _MS)

    def of_faults(count: int) -> st.SearchStrategy[tuple[Fault, ...]]:
        return st.lists(faults, min_size=count, max_size=count).map(_in_order)

    return st.builds(
        Schedule,
        st.sampled_from(["pipelined", "rounds"]),
        st.integers(0, 2**16),
        st.integers(0, max_faults).flatmap(of_faults),
    )


def _in_order(faults: list[Fault]) -> tuple[Fault, ...]:
    """One fault a step."""
    by_step = {fault.step: fault for fault in faults}
    return tuple(sorted(by_step.values()))
