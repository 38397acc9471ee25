"""``ringasync config``: what a file means, in full, and what follows from it."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from typing import Annotated

import typer

from ringasync.cli.options import ConfigArgument, SetOption
from ringasync.config.derive import derive
from ringasync.config.load import config_hash, load_config, resolved_json, resolved_toml
from ringasync.config.schema import Config


class Format(StrEnum):
    """How the configuration is printed."""

    TOML = "toml"
    JSON = "json"


def config(
    config: ConfigArgument,
    overrides: SetOption = None,
    check: Annotated[bool, typer.Option("--check", help="Only say whether it is valid.")] = False,
    output: Annotated[
        Format, typer.Option("--format", help="TOML loads back as a configuration.")
    ] = Format.TOML,
) -> None:
    """Print every setting with its value, and the figures that follow from them.

    Exit code 2 when the file is wrong; all that is wrong is named.

    Example: ringasync config configs/demo.toml --check --set schedule.budget.tokens=4096
    """
    loaded = load_config(config, overrides or ())
    if check:
        typer.echo(f"{config}: valid (hash {config_hash(loaded)})")
    elif output is Format.JSON:
        typer.echo(as_json(loaded))
    else:
        typer.echo(as_toml(loaded))


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
