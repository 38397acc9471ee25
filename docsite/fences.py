"""Blocks of commands in documents: the word after ``sh`` says how each is known to work."""

from __future__ import annotations

import re
from dataclasses import dataclass

FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```\s*?$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Kind:
    """How a block is known to work. ``test``: the file that runs it, empty for none."""

    note: str
    test: str = ""


def kind_of(info: list[str]) -> Kind:
    """What ``sh WORD`` stands for. Raises ``ValueError`` for a block without such a word.

    ``runnable``: tests/test_docs.py runs it as it is. ``test=FILE``: that test runs it on a world
    of its own. ``not-run``: no test runs it.
    """
    match info[1:]:
        case ["runnable"]:
            return Kind("Run by a test.", "tests/test_docs.py")
        case [word] if word.startswith("test="):
            file = word.removeprefix("test=")
            return Kind(f"Run by {file}.", file)
        case ["not-run"]:
            return Kind("Not run by a test; its options are checked.")
    raise ValueError(
        f"a block {' '.join(info)!r} must be `sh runnable`, `sh test=FILE` or `sh not-run`"
    )
