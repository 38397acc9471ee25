"""What a task source promises."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ringasync.config.schema import TaskConfig
from ringasync.errors import ConfigError

BUILT_IN_VERIFIERS = ("exact", "math_verify", "reasoning_gym")
"""Names that ``ringasync.rewards.verifiers`` knows without an import path."""

_USER_PREFIX = "python:"

Style = Literal["worked", "short"]
"""How a solution is written: step by step, or the answer straight off."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One prompt. ``task`` is JSON: the verifier's name and all it needs to score a response."""

    prompt: str
    domain: str
    task: dict[str, Any]
    source: str
    index: int


class TaskSource(Protocol):
    """A domain. ``size`` is the number of problems before they repeat, None when endless."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int | None: ...

    def problem(self, index: int) -> Problem:
        """The problem at ``index`` (0 <= index < size); the same at every call.

        Raises:
            BadPromptError: this row is empty, not text, or lacks a field.
        """
        ...

    def solution(self, index: int, style: Style) -> str | None:
        """A correct response in this style; None where the source knows none."""
        ...


def generator(*parts: object) -> random.Random:
    """A random generator that depends on ``parts`` only, on every machine and Python."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "big"))  # noqa: S311 - not for secrets


def check_verifier(task: TaskConfig, own: str) -> str:
    """The name of the task's verifier: the configured one, else the kind's ``own``.

    Raises:
        ConfigError: nobody knows that name. Better now than as an error of every rollout.
    """
    name = task.verifier or own
    module, _, function = name.removeprefix(_USER_PREFIX).partition(":")
    if name in BUILT_IN_VERIFIERS or (name.startswith(_USER_PREFIX) and module and function):
        return name
    raise ConfigError(
        f"data.tasks {task.name!r}: unknown verifier {name!r}; known: "
        f"{', '.join(BUILT_IN_VERIFIERS)}, or python:package.module:function"
    )
