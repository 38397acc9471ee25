"""Procedural tasks of the ``reasoning-gym`` library, scored by its own verifiers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from ringasync.config.schema import TaskConfig
from ringasync.errors import BadPromptError, ConfigError
from ringasync.tasks.base import Problem, Style, check_verifier, generator

CHUNK_ROWS = 500
"""Rows of one dataset object; the next rows come from another one with another seed.

Some datasets prepare all their rows when built: a huge size would never end. ``params.size``
changes it.
"""

_SEED_BITS = 31
"""numpy takes 32-bit seeds, and the library adds the row's number."""

Entry = Mapping[str, Any]


class ReasoningGymSource:
    """One reasoning-gym dataset. The answer is looked for after ``answer_mark``.

    Raises:
        ConfigError: the library refuses the dataset or its params.
    """

    size: int | None = None

    def __init__(self, task: TaskConfig, seed: int) -> None:
        self.name = task.name
        self._verifier = check_verifier(task, "reasoning_gym")
        self._dataset_name = task.dataset
        self._mark = task.answer_mark
        self._compact = task.compact
        self._seed = seed
        if task.compact and task.dataset not in COMPACT:
            raise ConfigError(
                f"data.tasks {task.name!r}: compact is known for {', '.join(sorted(COMPACT))}, "
                f"not for {task.dataset!r}: set compact = false"
            )
        if "seed" in task.params:
            raise ConfigError(f"data.tasks {task.name!r}: params.seed comes from run.seed")
        self._params: dict[str, Any] = {"size": CHUNK_ROWS, **task.params}
        self._dataset = lru_cache(maxsize=2)(self._make_dataset)
        try:
            self._dataset(0)
        except (ValueError, TypeError, AssertionError) as error:
            raise ConfigError(
                f"data.tasks {task.name!r}: reasoning-gym refuses dataset {task.dataset!r} "
                f"with params {task.params}: {error}"
            ) from error
        self._stored_whole = self._survives_json()

    def problem(self, index: int) -> Problem:
        """The library's entry at ``index`` with what its verifier needs.

        Raises:
            BadPromptError: the library's generator failed there, or made what JSON cannot hold.
        """
        entry = self._entry(index)
        question = COMPACT[self._dataset_name](entry) if self._compact else entry["question"]
        task: dict[str, Any] = {
            "verifier": self._verifier,
            "dataset": self._dataset_name,
            "params": self._params,
            "answer": entry["answer"],
            "answer_mark": self._mark,
        }
        if self._stored_whole:
            task["entry"] = entry
        else:  # the verifier draws the row again
            chunk, task["row"] = divmod(index, self._params["size"])
            task["seed"] = self._chunk_seed(chunk)
        try:
            # Through JSON here, so that what is scored is what can be stored.
            task = json.loads(json.dumps(task, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise BadPromptError(f"{self.name} row {index} cannot be stored: {error}") from error
        return Problem(question, self.name, task, f"reasoning_gym/{self._dataset_name}", index)

    def solution(self, index: int, style: Style) -> str | None:
        """A correct response with ``answer_mark`` before the answer, for datasets known here."""
        entry = self._entry(index)
        if entry["answer"] is None:  # many are right, and the library names none
            return None
        steps = WORKED.get(self._dataset_name)
        if style == "worked" and steps is not None and self._mark == "=":
            return steps(entry)
        return self._mark + str(entry["answer"])

    def _entry(self, index: int) -> dict[str, Any]:
        chunk, row = divmod(index, self._params["size"])
        try:
            entry: dict[str, Any] = self._dataset(chunk)[row]
        except Exception as error:  # generators fail on rare rows, each in its own way
            raise BadPromptError(
                f"{self.name} row {index}: reasoning-gym failed: {type(error).__name__}: {error}"
            ) from error
        return entry

    def _make_dataset(self, chunk: int) -> Any:
        import reasoning_gym

        return reasoning_gym.create_dataset(
            self._dataset_name, seed=self._chunk_seed(chunk), **self._params
        )

    def _chunk_seed(self, chunk: int) -> int:
        return generator(self._seed, self.name, chunk).getrandbits(_SEED_BITS)

    def _survives_json(self) -> bool:
        """Whether a right answer stays right when its entry went through JSON.

        Some verifiers compare tuples (``arc_agi``), which JSON turns into lists.
        """
        dataset = self._dataset(0)
        try:
            entry = dataset[0]
            copy = json.loads(json.dumps(entry, allow_nan=False))
            scores = [dataset.score_answer(entry["answer"], each) for each in (entry, copy)]
        except Exception:  # whatever it was: drawing the row again avoids it
            return False
        return bool(scores[0] == scores[1])


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
