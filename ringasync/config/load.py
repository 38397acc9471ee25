"""From a TOML file and overrides to a checked ``Config``, with errors a person can act on."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import tomli_w
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ringasync.config.keys import (
    generic_name,
    is_section,
    known_keys,
    nearest_keys,
    section_keys,
)
from ringasync.config.schema import Config
from ringasync.errors import ConfigError

Location = tuple[str | int, ...]

MAX_CONFIG_BYTES = 1 << 20
"""A configuration is a few kilobytes; anything near this is the wrong file."""

MAX_DEPTH = 32
"""Deepest nesting of a configuration; the schema needs five levels."""

LOCAL_KEYS = (
    "run.dir",
    "observability",
    "metrics",
    "redis",
    "worker.count",
    "worker.threads",
    "worker.max_concurrent",
    "worker.engine_options",
    "worker.gpus",
    "learner.backend",
    "learner.zero_stage",
    "learner.offload_optimizer",
    "learner.ranks",
    "learner.microbatch_tokens",
    "learner.logprob_chunk_tokens",
    "learner.activation_checkpointing",
)
"""What may differ between the roles and the lives of one run: it changes where, how fast and in how
much memory, not what. (The balance loss of routers is of a micro-batch: it does feel ``ranks`` and
``microbatch_tokens``, see docs/losses.md.)"""


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in the TOML file ``path``, with ``key=value`` overrides applied on top.

    An override's value is read as TOML (``3``, ``true``, ``[1, 2]``), else taken as text. List
    items are named by position: ``data.tasks.0.weight=2``.

    Raises:
        ConfigError: the file cannot be read, or settings are wrong; names the file and, all at
            once, each key, what is wrong with it and what is allowed.
    """
    return _checked(_parse(path, _read(path)), overrides, path)


def with_overrides(config: Config, overrides: Sequence[str], source: Path) -> Config:
    """``config`` with ``key=value`` overrides, as in ``load_config``; messages name ``source``.

    Raises:
        ConfigError: an override is wrong.
    """
    return _checked(config.model_dump(mode="json"), overrides, source)


def config_hash(config: Config) -> str:
    """16 hex digits over all that must be the same for every role of a run (see LOCAL_KEYS)."""
    data = config.model_dump(mode="json")
    for key in LOCAL_KEYS:
        *parents, leaf = key.split(".")
        table = data
        for parent in parents:
            table = table[parent]
        table.pop(leaf)
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def resolved_json(config: Config) -> str:
    """Every setting with its value as JSON; ``config_from_json`` reads it back."""
    return json.dumps(config.model_dump(mode="json"), indent=2)


def resolved_toml(config: Config) -> str:
    """Every setting with its value as TOML that ``load_config`` reads back to the same.

    What is left out on purpose (no limit) has no value in TOML and does not appear.
    """
    return tomli_w.dumps(cast("dict[str, Any]", _without_none(config.model_dump(mode="json"))))


def config_from_json(text: str) -> Config:
    """The configuration that ``resolved_json`` wrote, e.g. the one stored with a run.

    Raises:
        ConfigError: written by another release, or damaged.
    """
    try:
        return Config.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise ConfigError(_report(Path("stored configuration"), _explain_all(error, {}))) from None


def _checked(data: dict[str, Any], overrides: Sequence[str], path: Path) -> Config:
    """Apply the overrides to ``data`` and validate it; ``path`` is named in messages."""
    origins: dict[Location, str] = {}
    problems: list[str] = []
    for override in overrides:
        try:
            origins[_apply(data, override)] = override
        except ValueError as error:
            problems.append(f"--set {override}: {error}")
    problems += _values_that_are_no_settings(data, ())
    config: Config | None = None
    if not problems:
        try:
            # JSON mode: strict about types, yet a list is a tuple and text is a path.
            config = Config.model_validate_json(json.dumps(data), strict=True)
        except ValidationError as error:
            problems += _explain_all(error, origins)
    if config is None:
        raise ConfigError(_report(path, problems))
    return config


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; `ringasync init` writes one, shipped ones lie in configs/"
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; name the TOML file in it") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if len(raw) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes; not a configuration")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{path}: not UTF-8 text (byte {raw[error.start]:#04x} in line {line}); "
            "save it as UTF-8"
        ) from None


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except ValueError as error:  # also of Python itself, for a number of thousands of digits
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply; not a configuration") from None


def _apply(data: dict[str, Any], override: str) -> Location:
    """Set one override in ``data``; the location that was set."""
    key, equals, raw = override.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise ValueError("must look like section.key=value, e.g. loss.mismatch=tis")
    location: Location = tuple(int(p) if p.isdecimal() else p for p in key.split("."))
    if len(location) > MAX_DEPTH:
        raise ValueError("is nested too deeply")
    table: Any = data
    for depth, part in enumerate(location[:-1]):
        table = _child(table, location[: depth + 1], part)
    _check_place(table, location)
    table[location[-1]] = _toml_value(raw.strip())
    return location


def _child(table: Any, location: Location, part: str | int) -> Any:
    if isinstance(table, dict):
        return table.setdefault(part, {})
    _check_place(table, location)
    return table[part]


def _check_place(table: Any, location: Location) -> None:
    """Refuse an override whose last part does not fit what lies there."""
    part, parent = location[-1], _dotted(location[:-1])
    if isinstance(table, list):
        if not isinstance(part, int):
            raise ValueError(f"{parent} is a list; name the item by its position, {parent}.0")
        if part >= len(table):
            raise ValueError(f"{parent} has {len(table)} items, so there is none at {part}")
    elif not isinstance(table, dict):
        raise ValueError(f"{parent} is a single value and has no settings below it")
    elif isinstance(part, int):
        raise ValueError(f"{parent or 'the top'} is a table, not a list")


def _toml_value(raw: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {raw}")
    except (ValueError, RecursionError):
        return raw
    return parsed["value"] if len(parsed) == 1 else raw


def _values_that_are_no_settings(value: Any, location: Location) -> Iterator[str]:
    """Dates, infinities and NaN are TOML but never a setting; nor is anything absurdly deep."""
    if len(location) > MAX_DEPTH:
        yield f"{_dotted(location[:4])}...: nested too deeply"
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _values_that_are_no_settings(each, (*location, key))
    elif isinstance(value, list):
        for position, each in enumerate(value):
            yield from _values_that_are_no_settings(each, (*location, position))
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{_dotted(location)} = {value}: must be a finite number"
    elif isinstance(value, datetime.date | datetime.time):
        yield f"{_dotted(location)} = {value}: dates and times are no settings"


def _explain_all(error: ValidationError, origins: Mapping[Location, str]) -> list[str]:
    """One line a problem; a list that is only wrong because its items are is not named again."""
    errors = error.errors()

    def is_consequence(each: ErrorDetails) -> bool:
        place = each["loc"]
        deeper = (other["loc"] for other in errors if len(other["loc"]) > len(place))
        return each["type"] == "too_short" and any(d[: len(place)] == place for d in deeper)

    lines = [_explain(each, origins) for each in errors if not is_consequence(each)]
    return [part.strip() for line in lines for part in line.split("\n")]


def _explain(error: ErrorDetails, origins: Mapping[Location, str]) -> str:
    location = error["loc"]
    name = _dotted(location)
    source = f" (from --set {origins[location]})" if location in origins else ""
    if error["type"] == "extra_forbidden":
        return f"{name}: unknown setting{source}{_suggestion(location)}"
    if error["type"] == "missing":
        return f"{name}: is missing; {_allowed(location)}"
    if error["type"] == "value_error":
        rule = error["msg"].removeprefix("Value error, ")
        return f"{name}: {rule}{source}" if name else rule
    return f"{name} = {_shown(error['input'])}{source}: {_allowed(location)}"


def _allowed(location: Location) -> str:
    """The rule of the setting at ``location`` or, inside a free-form value, of what holds it."""
    keys = known_keys()
    for length in range(len(location), 0, -1):
        name = generic_name(location[:length])
        if name in keys:
            return f"must be {keys[name].allowed}"
        if is_section(f"{name}.*"):
            return f"must be a list of tables with the settings {_names(f'{name}.*')}"
        if is_section(name):
            return f"must be a table with the settings {_names(name)}"
    return f"must be a table with the settings {_names('')}"


def _suggestion(location: Location) -> str:
    near = " or ".join(nearest_keys(generic_name(location)))
    section = generic_name(location[:-1])
    known = _names(section)
    place = f"known in {section}" if section else "known sections"
    return (f"; did you mean {near}?" if near else "") + f" ({place}: {known})"


def _names(section: str) -> str:
    return ", ".join(section_keys(section))


def _dotted(location: Location) -> str:
    return ".".join(str(part) for part in location)


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _report(path: Path, problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return f"{path}: {problems[0]}"
    return "\n  ".join([f"{path}: {len(problems)} problems", *problems])


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_without_none(each) for each in value]
    return value
