"""What ``metrics.jsonl`` says so far: rebuilt from the file at a start, then kept up to date."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

RECENT_LENGTHS = 512
_SAMPLED_ENDS = ("ready", "filtered")
"""Ends at which every sibling has its verdict, so that the mean reward is unbiased."""


@dataclass(frozen=True, slots=True)
class EvalResult:
    """One held-out prompt: its reward, or None when it ended without a verdict."""

    domain: str
    reward: float | None
    length: int


@dataclass(slots=True)
class Prefills:
    """Prompt tokens that engines were given so far, from what workers say of theirs in snapshots.

    An engine counts from its start, and a worker may build a new one, so only rises are added up.
    What was counted after a worker's last snapshot is missing.
    """

    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    """Of them, those whose KV a prefix cache had."""
    _last: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def computed_tokens(self) -> int:
        """Prefilled: given and not cached."""
        return self.prompt_tokens - self.cached_prompt_tokens

    def add(self, workers: Iterable[Mapping[str, Any]]) -> None:
        """Take in the sessions of one snapshot; other roles say nothing of prompts."""
        for row in workers:
            if "prompt_tokens" not in row:
                continue
            now = int(row["prompt_tokens"]), int(row.get("cached_prompt_tokens", 0))
            before = self._last.get(str(row["id"]), (0, 0))
            if now[0] < before[0]:  # another engine
                before = (0, 0)
            self._last[str(row["id"])] = now
            self.prompt_tokens += now[0] - before[0]
            self.cached_prompt_tokens += now[1] - before[1]


@dataclass(slots=True)
class RunHistory:
    """The little that decisions and the summary need of all recorded lines.

    ``steps`` maps a learner step to its line's scalars (of a step trained again after a restart
    the last line counts, at the time of the first). ``sampled`` holds (time in ms, mean reward)
    of every complete training group. ``eval_results`` maps an evaluation's label to its prompts by
    group id.
    """

    last_ids: dict[str, str] = field(default_factory=dict)
    first_ms: int = 0
    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    sampled: list[tuple[int, float]] = field(default_factory=list)
    recent_lengths: deque[int] = field(default_factory=lambda: deque(maxlen=RECENT_LENGTHS))
    evals: dict[str, dict[str, Any]] = field(default_factory=dict)
    eval_results: dict[str, dict[str, EvalResult]] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)
    max_version: int = 0
    prefills: Prefills = field(default_factory=Prefills)

    def add(self, line: dict[str, Any]) -> None:
        """Take in one line, in file order."""
        if "id" in line and "stream" in line:
            self.last_ids[str(line["stream"])] = str(line["id"])
        kind = line.get("kind")
        if kind == "step":
            self._add_step(line)
        elif kind == "outcome":
            self._add_outcome(line)
        elif kind == "eval":
            self.evals[str(line["label"])] = line
        elif kind == "snapshot":
            self.prefills.add(line.get("workers") or ())
        elif kind == "start" and not self.first_ms:
            self.first_ms = int(line["at_ms"])

    def _add_step(self, line: dict[str, Any]) -> None:
        scalars = {
            name: value
            for name, value in line.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        number, at_ms = int(line["step"]), stream_ms(str(line.get("id", "0-0")))
        # Groups were sampled around the first time; a replay only repeats what came of them.
        at_ms = min(at_ms, self.steps.get(number, {}).get("at_ms", at_ms))
        self.steps[number] = {**scalars, "at_ms": at_ms}
        self.max_version = max(self.max_version, int(line.get("policy_version") or 0))

    def _add_outcome(self, line: dict[str, Any]) -> None:
        rewards, lengths = line["rewards"], line["lengths"]
        self.max_version = max(self.max_version, *line["versions"], 0)
        if line["group_kind"] == "eval":
            reward = float(rewards[0]) if line["end"] == "evaluated" and rewards else None
            label = eval_label(line["group"])
            result = EvalResult(line["domain"], reward, int(lengths[0]) if lengths else 0)
            self.eval_results.setdefault(label, {})[line["group"]] = result
            return
        if line.get("rollout"):  # replaced: its group goes on
            return
        self.ends[line["end"]] = self.ends.get(line["end"], 0) + 1
        if line["end"] in _SAMPLED_ENDS and rewards:
            self.sampled.append((stream_ms(str(line["id"])), sum(rewards) / len(rewards)))
            self.recent_lengths.extend(int(length) for length in lengths)


def stream_ms(entry_id: str) -> int:
    """Redis time of a stream entry, in milliseconds."""
    return int(entry_id.split("-")[0])


def eval_group_id(label: str, index: int) -> str:
    """Group id of one held-out prompt in one evaluation."""
    return f"e{label}-{index:04d}"


def eval_label(group_id: str) -> str:
    """The evaluation that a held-out group belongs to."""
    return group_id[1:].rpartition("-")[0]
