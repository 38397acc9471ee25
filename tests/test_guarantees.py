"""docs/guarantees.md names tests that exist: a promise without one is none."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "guarantees.md"
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def names_in(path: Path) -> set[str]:
    """Names of the test functions of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.walk(tree) if isinstance(node, functions)}


def named() -> list[tuple[str, str]]:
    return NAMED.findall(PAGE.read_text(encoding="utf-8"))


def rows() -> list[str]:
    """The table rows of the page, heads and rules left out."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    tables = [line for line in lines if line.startswith("|") and not line.startswith("|---")]
    return [line for line in tables if not line.endswith("proved by |")]


@pytest.mark.parametrize(("file", "test"), sorted(set(named())))
def test_a_named_test_exists(file: str, test: str) -> None:
    assert test in names_in(ROOT / file)


def test_every_promise_names_a_test() -> None:
    assert len(rows()) > 30
    assert [row for row in rows() if not NAMED.search(row.rsplit("|", 2)[1])] == []


def test_tests_and_files_that_other_pages_name_are_there() -> None:
    missing = [
        f"{page.name}: {path}"
        for page in sorted((ROOT / "docs").glob("*.md"))
        for path in re.findall(
            r"`((?:tests|ringasync|learner|workers|deploy)/[\w/.-]+\.\w+)[`:]", page.read_text()
        )
        if not (ROOT / path).is_file()
    ]
    assert missing == []
