"""Every setting by its dotted key, read from the schema: for messages, help and the docs."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ringasync.config.schema import Config

_WORDS: dict[object, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    Path: "a path",
    dict: "a table",
}


@dataclass(frozen=True, slots=True)
class Key:
    """One setting: its dotted name (list items as ``*``) and what it may be, in words."""

    name: str
    allowed: str


def known_keys() -> dict[str, Key]:
    """All settings of a run, sections left out, in the schema's order."""
    return {key.name: key for key in _walk(Config, "")}


def section_keys(section: str) -> list[str]:
    """Last parts of the keys and subsections directly below ``section`` (empty: the top)."""
    prefix = f"{section}." if section else ""
    names = [name.removeprefix(prefix) for name in known_keys() if name.startswith(prefix)]
    return list(dict.fromkeys(name.split(".")[0] for name in names))


def is_section(name: str) -> bool:
    """Whether ``name`` holds settings rather than being one."""
    return any(key.startswith(f"{name}.") for key in known_keys())


def nearest_keys(unknown: str) -> list[str]:
    """Up to three known keys or sections that ``unknown`` may stand for, likeliest first.

    Looks at its own section, then at the whole name, then at the same or a like last part in
    another section: ``lr`` at the top may mean ``learner.lr``.
    """
    section, _, leaf = unknown.rpartition(".")
    prefix = f"{section}." if section else ""
    siblings = difflib.get_close_matches(leaf, section_keys(section), n=1, cutoff=0.6)
    if siblings:
        return [prefix + siblings[0]]
    names = list(known_keys())
    whole = difflib.get_close_matches(unknown, names, n=1, cutoff=0.8)
    if whole:
        return whole
    leaves = {name.rsplit(".", 1)[-1] for name in names}
    near = difflib.get_close_matches(leaf, sorted(leaves), n=1, cutoff=0.75)
    return [name for name in names if near and name.rsplit(".", 1)[-1] == near[0]][:3]


def generic_name(location: Sequence[str | int]) -> str:
    """Dotted schema name of a location in a file: list positions become ``*``."""
    return ".".join("*" if isinstance(part, int) else part for part in location)


def _walk(model: type[BaseModel], prefix: str) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        dotted = f"{prefix}{name}"
        inner, is_list = inner_model(field.annotation)
        if inner is None:
            yield Key(dotted, describe(field))
        else:
            yield from _walk(inner, f"{dotted}.*." if is_list else f"{dotted}.")


def inner_model(annotation: object) -> tuple[type[BaseModel] | None, bool]:
    """The section that a field of this type holds, if any, and whether it holds a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    arguments = get_args(annotation)
    if get_origin(annotation) is tuple and arguments:
        return inner_model(arguments[0])[0], True
    return None, False


def describe(field: FieldInfo) -> str:
    """What a setting may be: ``a whole number, at least 1``."""
    return ", ".join([_type_words(field.annotation), *_limits(field.metadata)])


def _type_words(annotation: object) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(repr(value) for value in arguments)
    if origin in (Union, types.UnionType):
        words = [_type_words(each) for each in arguments if each is not type(None)]
        return " or ".join(words) + (", or left out" if type(None) in arguments else "")
    if origin is tuple:
        return f"a list of {len(arguments)} values, each {_type_words(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a table"
    return _WORDS.get(origin or annotation, str(annotation))


def _limits(metadata: Sequence[Any]) -> Iterator[str]:
    for limit in metadata:
        match limit:
            case annotated_types.Ge():
                yield f"at least {limit.ge}"
            case annotated_types.Gt():
                yield f"above {limit.gt}"
            case annotated_types.Le():
                yield f"at most {limit.le}"
            case annotated_types.Lt():
                yield f"below {limit.lt}"
            case annotated_types.MultipleOf():
                yield f"a multiple of {limit.multiple_of}"
            case annotated_types.MinLen():
                yield f"at least {limit.min_length} of them"
            case _:
                pattern = getattr(limit, "pattern", None)
                if pattern:
                    yield f"matching {pattern}"
