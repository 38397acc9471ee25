"""``ringasync init``: a new configuration to begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ringasync.config.template import config_template
from ringasync.errors import ConfigError


def init(
    path: Annotated[Path, typer.Argument(metavar="[PATH]", help="File to write.")] = Path(
        "ringasync.toml"
    ),
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
) -> None:
    """Write a configuration with every setting explained and at its default.

    Example: ringasync init mine.toml
    """
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(config_template())
    except FileExistsError:
        raise ConfigError(f"{path}: is there already; --force overwrites it") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}; name a file") from None
    typer.echo(f"{path}: written; next: ringasync config --check {path}")
