"""Commands in the documentation: they exist, their options exist, and marked ones are run.

Each `ringasync` and `make` line of a fenced block of commands is checked. The word after
```` ```sh ```` says whether a test runs the block, see ``docsite/fences.py``; what is marked
`runnable` is run here, as it is.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
import typer.main
from typer.core import TyperGroup

from docsite.fences import FENCE, kind_of
from ringasync.cli.main import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    path
    for pattern in ("README.md", "docs/**/*.md", "configs/*.md")
    for path in sorted(ROOT.glob(pattern))
]
USAGE_ERROR = typer.BadParameter.__base__ or Exception
"""typer carries a click of its own and shows only this one of its errors."""

COMMANDS = {command.name for command in typer.main.get_group(app).commands.values()}
LINK = re.compile(r"\[[^\]]+\]\((?P<target>[^)#\s]+)(?:#[^)]*)?\)")


@dataclass(frozen=True)
class Line:
    """One command of a document, continuation lines joined."""

    document: Path
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}: {self.text}"


def blocks(document: Path) -> Iterator[tuple[list[str], str]]:
    for match in FENCE.finditer(document.read_text(encoding="utf-8")):
        info = match["info"].split()
        if info and info[0] in ("sh", "bash", "shell"):
            yield info, match["body"]


def lines() -> Iterator[Line]:
    for document in DOCUMENTS:
        for _, body in blocks(document):
            for text in body.replace("\\\n", " ").splitlines():
                stripped = text.strip().removeprefix("$ ").strip()
                if stripped and not stripped.startswith("#"):
                    yield Line(document, stripped)


def calls(program: str) -> list[Line]:
    """Lines that run ``program``, assignments before it left out."""
    found = []
    for line in lines():
        words = line.words
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words and Path(words[0]).name == program:
            found.append(Line(line.document, shlex.join([program, *words[1:]])))
    return found


def make_targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))


def test_documents_hold_commands() -> None:
    assert calls("ringasync"), "no `ringasync` command found in any document"


@pytest.mark.parametrize("line", calls("ringasync"), ids=str)
def test_documented_command_parses(line: Line) -> None:
    assert parse(line.words[1:]) in COMMANDS


@pytest.mark.parametrize(
    "text",
    [
        *("upp configs/demo.toml", "up", "up a.toml --nope", "samples -n", "samples -n many"),
        *("--install-completion", "up --help"),
    ],
)
def test_wrong_command_would_be_noticed(text: str) -> None:
    with pytest.raises(USAGE_ERROR):
        parse(shlex.split(text))


def parse(arguments: list[str]) -> str | None:
    """The command that ``arguments`` name; wrong ones raise. Nothing is run."""
    before_command = set(itertools.takewhile(lambda word: word.startswith("-"), arguments))
    if acting := (before_command | {"--help", "-h"} & set(arguments)):
        # --install-completion would write into the home of whoever runs the tests.
        raise typer.BadParameter(f"{', '.join(acting)} acts when parsed: write it in prose")
    arguments = list(itertools.takewhile(lambda word: word not in ("&", "|", ">", "&&"), arguments))
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    context = group.make_context("ringasync", arguments)
    _, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
    assert command is not None
    command.make_context(command.name, rest, parent=context)
    return command.name


@pytest.mark.parametrize("line", calls("ringasync"), ids=str)
def test_documented_configuration_exists(line: Line) -> None:
    named = [word for word in line.words if word.startswith("configs/")]
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("line", calls("make"), ids=str)
def test_documented_make_target_exists(line: Line) -> None:
    wanted = {word for word in line.words[1:] if re.fullmatch(r"[a-z-]+", word)}
    assert wanted <= make_targets()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_block_says_who_runs_it(document: Path) -> None:
    """Where another test runs it, that test names the document."""
    for info, body in blocks(document):
        test = kind_of(info).test
        if test and test != "tests/test_docs.py":
            assert document.name in (ROOT / test).read_text(encoding="utf-8"), body


@pytest.mark.parametrize("info", ["sh", "bash runnable x", "sh runs"])
def test_block_without_its_word_would_be_noticed(info: str) -> None:
    with pytest.raises(ValueError, match="sh runnable"):
        kind_of(info.split())


RUNNABLE = [
    pytest.param(document, body, id=f"{document.relative_to(ROOT)}-{number}")
    for document in DOCUMENTS
    for number, (info, body) in enumerate(blocks(document))
    if "runnable" in info
]


@pytest.mark.parametrize(("document", "body"), RUNNABLE)
def test_runnable_block_runs(document: Path, body: str, tmp_path: Path) -> None:
    """As a person would paste it, in the root of the project, with ringasync on PATH."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    command = bin_dir / "ringasync"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ringasync "$@"\n')
    command.chmod(0o755)
    done = subprocess.run(
        ["bash", "-eu", "-o", "pipefail", "-c", body],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, f"{document}: {done.stdout}{done.stderr}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    targets = [match["target"] for match in LINK.finditer(document.read_text(encoding="utf-8"))]
    local = [
        target for target in targets if "://" not in target and not target.startswith("mailto")
    ]
    assert [target for target in local if not (document.parent / target).exists()] == []
