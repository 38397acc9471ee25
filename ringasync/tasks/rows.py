"""Finite data: local JSONL files and hub datasets, both read by the ``datasets`` library."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ringasync.config.schema import TaskConfig
from ringasync.errors import BadPromptError, ConfigError
from ringasync.tasks.base import BUILT_IN_VERIFIERS, Problem, Style, check_verifier


class RowSource:
    """Rows with a prompt and an answer. One broken row raises ``BadPromptError``, no more."""

    def __init__(self, task: TaskConfig, rows: Sequence[Any]) -> None:
        if not len(rows):
            raise ConfigError(f"data.tasks {task.name!r}: {task.dataset!r} holds no rows")
        self.name = task.name
        self._task = task
        self._rows = rows
        self._verifier = check_verifier(task, "math_verify")
        self.size: int | None = len(rows)

    def problem(self, index: int) -> Problem:
        """The row at ``index``."""
        row = self._row(index)
        prompt = row.get(self._task.prompt_field)
        if not isinstance(prompt, str) or not prompt.strip():
            raise BadPromptError(
                f"{self.name} row {index}: {self._task.prompt_field!r} is {_shown(prompt)}, "
                "not a text with something in it"
            )
        task = {
            "verifier": self._verifier,
            "answer": self._answer(row, index),
            "prompt": prompt,
            "answer_mark": self._task.answer_mark,
        }
        try:
            # Lone surrogates pass as JSON's \\u escapes, but Redis takes UTF-8 only.
            json.dumps(task, allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError) as error:
            raise BadPromptError(f"{self.name} row {index} cannot be stored: {error}") from error
        return Problem(prompt, self.name, task, self._task.dataset, index)

    def solution(self, index: int, style: Style) -> str | None:
        """The row's answer, if it is text; there are no worked steps."""
        answer = self._row(index).get(self._task.answer_field)
        return answer if isinstance(answer, str) and style == "short" else None

    def _answer(self, row: dict[str, Any], index: int) -> Any:
        """The reference answer; a user's own function may do without."""
        answer = row.get(self._task.answer_field)
        is_scalar = isinstance(answer, str | int | float) and not isinstance(answer, bool)
        if self._verifier in BUILT_IN_VERIFIERS and not (is_scalar and str(answer).strip()):
            raise BadPromptError(
                f"{self.name} row {index}: {self._task.answer_field!r} is {_shown(answer)}, "
                "not an answer to compare with"
            )
        return answer

    def _row(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        if self._task.kind == "jsonl":
            row = _parse_line(self.name, index, row["text"])
        if not isinstance(row, dict):
            raise BadPromptError(f"{self.name} row {index} is not an object")
        return row


def load_jsonl(task: TaskConfig) -> RowSource:
    """A local file, one JSON object a line."""
    from datasets import load_dataset

    path = Path(task.dataset)
    if not path.is_file():
        raise ConfigError(f"data.tasks {task.name!r}: there is no file {task.dataset!r}")
    if not path.stat().st_size:
        raise ConfigError(f"data.tasks {task.name!r}: {task.dataset!r} holds no rows")
    # Line by line and byte by byte (latin-1 keeps every byte), so that one row that is not UTF-8
    # or not JSON is one bad row and not the end of the file.
    rows = load_dataset("text", data_files=str(path), split="train", encoding="latin-1")
    return RowSource(task, rows)


def load_hub(task: TaskConfig) -> RowSource:
    """A dataset of the hub (or a local folder of one), by name and split."""
    from datasets import load_dataset

    try:
        rows = load_dataset(task.dataset, split=task.split, **task.params)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"data.tasks {task.name!r}: dataset {task.dataset!r} split {task.split!r} cannot be "
            f"loaded: {error}"
        ) from error
    return RowSource(task, rows)


def _parse_line(name: str, index: int, line: str) -> Any:
    try:
        return json.loads(line.encode("latin-1").decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadPromptError(f"{name} row {index} is not UTF-8: {error.reason}") from error
    except (ValueError, RecursionError) as error:
        raise BadPromptError(f"{name} row {index} is not JSON: {error}") from error


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
