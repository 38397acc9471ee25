"""Procedural tasks of the ``reasoning-gym`` library, scored by its own verifiers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from ringasync.config.schema import TaskConfig
from ringasync.errors import ConfigError
from ringasync.tasks.base import Problem, Style, generator

_ENDLESS = 1 << 40
"""Size given to the library: entries are made on demand, so this costs nothing."""

Entry = Mapping[str, Any]


class ReasoningGymSource:
    """One reasoning-gym dataset. The answer is looked for after ``answer_mark``."""

    size: int | None = None

    def __init__(self, task: TaskConfig, seed: int) -> None:
        import reasoning_gym

        self.name = task.name
        self._dataset_name = task.dataset
        self._mark = task.answer_mark
        self._compact = task.compact
        if task.compact and task.dataset not in COMPACT:
            raise ConfigError(
                f"data.tasks {task.name!r}: compact is known for {', '.join(sorted(COMPACT))}, "
                f"not for {task.dataset!r}: set compact = false"
            )
        try:
            self._entries: Any = reasoning_gym.create_dataset(
                task.dataset,
                seed=generator(seed, task.name).getrandbits(31),
                size=_ENDLESS,
                **task.params,
            )
        except (ValueError, TypeError, AssertionError) as error:
            raise ConfigError(
                f"data.tasks {task.name!r}: reasoning-gym refuses dataset {task.dataset!r} "
                f"with params {task.params}: {error}"
            ) from error

    def problem(self, index: int) -> Problem:
        """The library's entry at ``index`` with what its verifier needs."""
        entry = self._entries[index]
        question = COMPACT[self._dataset_name](entry) if self._compact else entry["question"]
        task = {
            "verifier": "reasoning_gym",
            "dataset": self._dataset_name,
            "answer_mark": self._mark,
            # Through JSON here, so that what is scored is what can be stored.
            "entry": json.loads(json.dumps(entry, default=str)),
        }
        return Problem(question, self.name, task, f"reasoning_gym/{self._dataset_name}", index)

    def solution(self, index: int, style: Style) -> str | None:
        """A correct response with ``answer_mark`` before the answer, for datasets known here."""
        entry = self._entries[index]
        steps = WORKED.get(self._dataset_name)
        if style == "worked" and steps is not None and self._mark == "=":
            return steps(entry)
        return self._mark + str(entry["answer"])


def _running_sum(entry: Entry) -> str:
    """``7-4+2`` as ``7-4=3+2=5``: one step a term, so that lengths vary with the problem."""
    first, *rest = str(entry["metadata"]["expression"]).split()
    total, text = int(first), first
    for operator, term in zip(rest[::2], rest[1::2], strict=True):
        total += int(term) if operator == "+" else -int(term)
        text += f"{operator}{term}={total}"
    return text if rest else f"{first}={first}"


def _expression(entry: Entry) -> str:
    return str(entry["metadata"]["expression"]).replace(" ", "")


def _last_word(entry: Entry) -> str:
    found = re.search(r"(\w+)\s*$", str(entry["question"]))
    return found.group(1) if found else str(entry["question"])


COMPACT: dict[str, Callable[[Entry], str]] = {
    "chain_sum": _expression,
    "spell_backward": _last_word,
}
"""Datasets whose question has a short form."""

WORKED: dict[str, Callable[[Entry], str]] = {"chain_sum": _running_sum}
"""Datasets whose entries tell enough to write the steps down."""
