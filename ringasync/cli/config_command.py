"""``ringasync config``: what a file means, in full, and what follows from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ringasync.cli.options import ConfigArgument, SetOption
from ringasync.config.arithmetic import arithmetic, model_shape
from ringasync.config.derive import Derived, derive
from ringasync.config.load import config_hash, load_config, resolved_json, resolved_toml
from ringasync.config.model_shape import KNOWN_TYPES, ModelShape
from ringasync.config.schema import Config
from ringasync.errors import ConfigError


class Format(StrEnum):
    """How the configuration is printed."""

    TOML = "toml"
    JSON = "json"


def config(
    config: ConfigArgument,
    overrides: SetOption = None,
    check: Annotated[
        bool, typer.Option("--check", help="Say whether it is valid, and what it takes.")
    ] = False,
    output: Annotated[
        Format, typer.Option("--format", help="TOML loads back as a configuration.")
    ] = Format.TOML,
    model_config: Annotated[
        Path | None,
        typer.Option(help="With --check: config.json of the model, where model.path is no folder."),
    ] = None,
) -> None:
    """Print every setting with its value, and the figures that follow from them.

    Exit code 2 when the file is wrong; all that is wrong is named.

    Example: ringasync config configs/demo.toml --check --set schedule.budget.tokens=4096
    """
    loaded = load_config(config, overrides or ())
    if check:
        figures = arithmetic(loaded, _shape(loaded, model_config))
        if output is Format.JSON:
            typer.echo(check_json(loaded, figures))
            return
        typer.echo(f"{config}: valid (hash {config_hash(loaded)})")
        Console().print(check_table(figures))
    elif output is Format.JSON:
        typer.echo(as_json(loaded))
    else:
        typer.echo(as_toml(loaded))


def _shape(loaded: Config, model_config: Path | None) -> ModelShape | None:
    shape = model_shape(loaded, model_config)
    if shape is None and model_config is not None:
        raise ConfigError(
            f"--model-config {model_config}: not a readable config.json of one of "
            f"{', '.join(KNOWN_TYPES)}; leave the option out, or name a model of these kinds"
        )
    return shape


def check_table(figures: Sequence[Derived]) -> Table:
    """Tokens and memory: what, how much, and the sum it comes from."""
    table = Table("figure", "value", "from", box=None, pad_edge=False)
    for each in figures:
        table.add_row(*(Text(cell) for cell in (each.name, each.value, each.formula)))
    return table


def check_json(loaded: Config, figures: Sequence[Derived]) -> str:
    """Hash and the figures of ``--check`` as one JSON object."""
    body = {"valid": True, "config_hash": config_hash(loaded)}
    return json.dumps({**body, "arithmetic": [asdict(each) for each in figures]}, indent=2)


def as_json(loaded: Config) -> str:
    """Settings, hash and derived figures as one JSON object."""
    return json.dumps(
        {
            "config": json.loads(resolved_json(loaded)),
            "config_hash": config_hash(loaded),
            "derived": [asdict(each) for each in derive(loaded)],
        },
        indent=2,
    )


def as_toml(loaded: Config) -> str:
    """Settings as TOML; hash and derived figures as comments below."""
    figures = derive(loaded)
    width = max(len(each.name) for each in figures)
    lines = [resolved_toml(loaded), "# What follows from these settings:"]
    lines += [f"#   {each.name:<{width}}  {each.value}  ({each.formula})" for each in figures]
    lines.append(f"#   {'hash of what roles must agree on':<{width}}  {config_hash(loaded)}")
    return "\n".join(lines)
