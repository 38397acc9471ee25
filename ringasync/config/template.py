"""A new configuration file: every setting with its explanation, rule and default."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator

import tomli_w
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ringasync.config.keys import describe, inner_model
from ringasync.config.schema import Config

WIDTH = 96

HEAD = """\
# Configuration of a ringasync run, written by `ringasync init`.
#
# A line `#key = value` shows a setting at its default: take the # away to change it. Above it is
# said what it may be. What is not set follows the defaults of the installed release.
# `ringasync config --check FILE` names all mistakes; `ringasync up FILE` runs it on this machine.
"""

EXAMPLES: dict[str, dict[str, object]] = {
    "data.tasks": {"name": "equations", "kind": "mathematics", "dataset": "linear_equation"},
}
"""Settings without a default, by section: the file must have them to be one."""


def config_template() -> str:
    """The text of a TOML file that loads to all defaults and one small task.

    Lines that begin with ``#key =`` are settings, those that begin with ``# `` are prose.
    """
    return "\n".join([HEAD, *_section(Config, "")]).rstrip() + "\n"


def _section(model: type[BaseModel], name: str, is_list: bool = False) -> Iterator[str]:
    """Scalars of the section first: after a sub-table's header they would belong to that one."""
    explained, below = field_docstrings(model), []
    if name:
        yield from _prose(inspect.cleandoc(model.__doc__ or ""))
        yield f"[[{name}]]" if is_list else f"[{name}]"
    for key, field in model.model_fields.items():
        inner, listed = inner_model(field.annotation)
        dotted = f"{name}.{key}" if name else key
        if inner is not None:
            below.append((inner, dotted, listed))
            continue
        yield from _prose(explained.get(key, ""))
        yield from _prose(describe(field))
        yield _setting(key, field, EXAMPLES.get(name, {}))
    yield ""
    for inner, dotted, listed in below:
        yield from _section(inner, dotted, listed)


def _setting(key: str, field: FieldInfo, examples: dict[str, object]) -> str:
    if key in examples:
        return f"{key} = {toml_text(examples[key])}"
    default = field.get_default(call_default_factory=True, validated_data={})
    # TOML has no null: a setting without a value is one that is left out.
    return f"# {key} is left out" if default is None else f"#{key} = {toml_text(default)}"


def toml_text(value: object) -> str:
    """A setting's value as TOML writes it."""
    if isinstance(value, dict):
        return "{}" if not value else json.dumps(value)
    if isinstance(value, tuple):
        return f"[{', '.join(map(toml_text, value))}]"
    plain = value if isinstance(value, bool | int | float) else str(value)
    return tomli_w.dumps({"v": plain}).removeprefix("v = ").rstrip("\n")


def _prose(text: str) -> Iterator[str]:
    for paragraph in text.split("\n\n"):
        if paragraph:
            wrapped = textwrap.wrap(" ".join(paragraph.split()), WIDTH, break_on_hyphens=False)
            yield from (f"# {line}" for line in wrapped)


def field_docstrings(model: type[BaseModel]) -> dict[str, str]:
    """The string below each field of the class, read from its source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(model))).body[0]
    found: dict[str, str] = {}
    if isinstance(body, ast.ClassDef):
        for node, after in zip(body.body, body.body[1:], strict=False):
            match node, after:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    found[name] = inspect.cleandoc(text)
    return found
