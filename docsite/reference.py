"""The reference pages, generated from the code: what is in it is on the page, or this fails."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import typer
import typer.main
from pydantic import BaseModel
from typer.cli import get_docs_for_click

from ringasync.broker.keys import Keys
from ringasync.cli.main import app
from ringasync.config.keys import describe, inner_model
from ringasync.config.schema import Config
from ringasync.config.template import EXAMPLES, field_docstrings, toml_text
from ringasync.errors import ConfigError

KEYS_PAGE = Path(__file__).parents[1] / "docs" / "redis-cli.md"
_MARKS = {"rollout_id": "GROUP.i", "group_id": "GROUP", "session_id": "ID", "batch_id": "BATCH"}
"""Parameters of the key methods -> what the hand-written table calls them (else capitals)."""


def pages() -> dict[str, str]:
    """Path within the site -> Markdown of each generated page."""
    return {
        "reference/configuration.md": configuration_page(),
        "reference/cli.md": cli_page(),
        "reference/keys.md": keys_page(),
    }


def configuration_page() -> str:
    """Every setting of the schema: default, what it may be, and its explanation."""
    head = (
        "# Configuration\n\nGenerated from `ringasync/config/schema.py`. `ringasync init` writes "
        "the "
        "same as a file to edit; `ringasync config --check FILE` names every mistake at once.\n"
    )
    return "\n".join([head, *_section(Config, "")])


def _section(model: type[BaseModel], name: str, is_list: bool = False) -> Iterator[str]:
    explained, below, rows = field_docstrings(model), [], []
    for key, field in model.model_fields.items():
        inner, listed = inner_model(field.annotation)
        dotted = f"{name}.{key}" if name else key
        if inner is not None:
            below.append((inner, f"{dotted}.*" if listed else dotted, listed))
            continue
        default = field.get_default(call_default_factory=True, validated_data={})
        shown = "left out" if default is None else f"`{toml_text(default)}`"
        if field.is_required() or key in EXAMPLES.get(name, {}):
            shown = "required"
        cells = (f"`{dotted}`", shown, describe(field), explained.get(key, ""))
        rows.append("| " + " | ".join(map(_cell, cells)) + " |")
    if name:
        shown_name = f"[[{name.removesuffix('.*')}]]" if is_list else f"[{name}]"
        yield f"## `{shown_name}`\n\n{inspect.cleandoc(model.__doc__ or '')}\n"
    if rows:
        yield "| setting | default | may be | what |\n|---|---|---|---|"
        yield from rows
        yield ""
    for inner, dotted, listed in below:
        yield from _section(inner, dotted, listed)


def _cell(text: str) -> str:
    """On one line, without what would end the cell; double backquotes are not Markdown's."""
    return " ".join(text.replace("``", "`").replace("|", "\\|").split())


def cli_page() -> str:
    """Every command with its arguments and options, by typer's own generator."""
    group = typer.main.get_command(app)
    text = get_docs_for_click(obj=group, ctx=typer.Context(group), name="ringasync")
    return text.replace("# `ringasync`", "# Command line\n\nGenerated from `ringasync.cli`.", 1)


def keys_page() -> str:
    """Every key of ``ringasync/broker/keys.py`` with what it holds.

    What it holds is said in one place, the table of docs/redis-cli.md. Raises ``ConfigError`` for a
    key that this table does not have.
    """
    told = key_table()
    lines = [
        "# Redis keys\n",
        "Generated from `ringasync/broker/keys.py`; `…` stands for `ring:{RUN}:`. How to read "
        "them: "
        "[one-liners](../redis-cli.md).\n",
        "| key | in the code | type | holds |\n|---|---|---|---|",
    ]
    patterns = key_patterns()
    for name, pattern in patterns.items():
        if pattern not in told:
            raise ConfigError(
                f"{pattern} (Keys.{name}): add a row to the table in {KEYS_PAGE.name}"
            )
        kind, holds = told.pop(pattern)
        lines.append(f"| `{pattern}` | `Keys.{name}` | {kind} | {holds} |")
    lines += [
        f"| `{pattern}` | scripts and weights | {kind} | {holds} |"
        for pattern, (kind, holds) in told.items()
    ]
    return "\n".join(lines) + "\n"


def key_patterns() -> dict[str, str]:
    """Name in ``Keys`` -> the key as documents write it: ``session`` -> ``…session:ID``."""
    keys = Keys("RUN")
    found = {
        name: value.replace(keys.prefix, "…")
        for name, value in vars(keys).items()
        if name not in ("run", "prefix")
    }
    for name, method in inspect.getmembers(Keys, inspect.isfunction):
        if not name.startswith("_"):
            marks = [_MARKS.get(p, p.upper()) for p in inspect.signature(method).parameters][1:]
            found[name] = str(method(keys, *marks)).replace(keys.prefix, "…")
    return found


def key_table() -> dict[str, tuple[str, str]]:
    """Key -> (type, what it holds), from the table of docs/redis-cli.md."""
    found: dict[str, tuple[str, str]] = {}
    for line in KEYS_PAGE.read_text(encoding="utf-8").splitlines():
        if match := re.fullmatch(r"\| (`….*?) \| (.*?) \| (.*) \|", line):
            names = re.findall(r"`(.*?)`", match[1])
            kinds = match[2].split(", ") if ", " in match[2] else [match[2]] * len(names)
            for name, kind in zip(names, kinds, strict=True):
                found[name] = (kind, match[3])
    return found
