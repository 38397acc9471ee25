"""What a chaos run did and found, as JSON and as a table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .faults import DECK
from .leg import Recovery, Tally
from .losses import BOUND_TOKENS, Loss


@dataclass
class Report:
    """Sums over the legs of one chaos run."""

    tallies: list[Tally] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    unmeasured: int = 0
    groups: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    steps_without_loss: int = 0

    @property
    def faults(self) -> int:
        """Confirmed ones."""
        return sum(len(tally.delivered) for tally in self.tallies)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        resumed = [loss.resumed_s for loss in self.losses if loss.resumed_s is not None]
        tokens = [loss.tokens for loss in self.losses]
        return {
            "faults": self.faults,
            "faults_by_kind": dict(sorted(self._by_kind().items())),
            "not_felt": sum(len(tally.unfelt) for tally in self.tallies),
            "skipped": dict(sum((tally.skipped for tally in self.tallies), Counter[str]())),
            "seeds": [tally.seed for tally in self.tallies],
            "took_s": round(sum(tally.took_s for tally in self.tallies), 1),
            "restarts_of_up_after_a_full_disk": sum(t.restarts_of_up for t in self.tallies),
            "steps": self.steps,
            "steps_whose_line_died_with_its_learner": self.steps_without_loss,
            "groups_by_end": dict(sorted(self.groups.items())),
            "tokens_by_account": dict(sorted(self.tokens.items())),
            "recovery_s": self._recoveries(),
            "resumption_of_a_rollout_s": spread(resumed),
            "tokens_lost_of_a_rollout": spread(tokens),
            "tokens_lost_bound": BOUND_TOKENS,
            "tokens_kept_of_hit_rollouts": sum(loss.length for loss in self.losses),
            "workers_hit_not_measured": self.unmeasured,
        }

    def _by_kind(self) -> Counter[str]:
        return sum((tally.by_kind() for tally in self.tallies), Counter[str]())

    def never_felt(self) -> list[str]:
        """Kinds of which no fault was felt, but for those that this machine cannot have."""
        felt = {name.split()[0] for name in self._by_kind()}
        skipped = {kind for tally in self.tallies for kind in tally.skipped}
        return sorted({kind.kind for kind in DECK} - felt - skipped)

    def _recoveries(self) -> dict[str, Any]:
        every: list[Recovery] = [one for tally in self.tallies for one in tally.recoveries]
        return {
            what: spread([one.took_s for one in every if one.what == what])
            for what in sorted({one.what for one in every})
        }

    def write(self, path: Path) -> None:
        """As JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def lines(self) -> list[str]:
        """As tables in Markdown."""
        data = self.to_dict()
        rows = [f"| {kind} | {count} |" for kind, count in data["faults_by_kind"].items()]
        spreads = {
            **{f"recovery, {what}, s": value for what, value in data["recovery_s"].items()},
            "kill to resumption of a rollout, s": data["resumption_of_a_rollout_s"],
            f"tokens lost of a rollout ({BOUND_TOKENS} may be)": data["tokens_lost_of_a_rollout"],
        }
        figures = [
            f"| {what} | {one['n']} | {one['p50']} | {one['p99']} | {one['max']} |"
            for what, one in spreads.items()
        ]
        return [
            f"{data['faults']} faults felt in {data['took_s']:.0f} s of {len(self.tallies)} runs "
            f"(seeds {data['seeds'][0]} to {data['seeds'][-1]}), {data['not_felt']} not felt and "
            f"not counted, skipped: {data['skipped'] or 'none'}",
            f"{data['steps']} steps; groups: {data['groups_by_end']}; tokens: "
            f"{data['tokens_by_account']}",
            "",
            "| fault | felt |",
            "|---|---|",
            *rows,
            "",
            "| | n | p50 | p99 | max |",
            "|---|---|---|---|---|",
            *figures,
        ]


def spread(values: Sequence[float] | Iterable[float]) -> dict[str, Any]:
    """Number, median, 99th percentile and maximum; None where there is nothing."""
    all_of = list(values)
    if not all_of:
        return {"n": 0, "p50": None, "p99": None, "max": None}
    p50, p99 = np.percentile(all_of, [50, 99])
    return {
        "n": len(all_of),
        "p50": round(float(p50), 3),
        "p99": round(float(p99), 3),
        "max": round(float(max(all_of)), 3),
    }
