"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigArgument = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="TOML file of the run, e.g. configs/demo.toml")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override one setting, e.g. --set loss.mismatch=tis. May be repeated.",
    ),
]
RedisUrlOption = Annotated[
    str,
    typer.Option(
        "--redis-url",
        metavar="URL",
        envvar="RINGASYNC_REDIS_URL",
        help="Address of the broker; default: what the configuration or the run's folder says.",
    ),
]
ModelOption = Annotated[
    str,
    typer.Option(
        "--model", metavar="PATH", help="Starting model: a folder or a hub name (else model.path)."
    ),
]
WaitOption = Annotated[
    bool,
    typer.Option(
        "--wait",
        help="Where `starter` is named: wait until `coordinator --prepare` has built it.",
    ),
]
RunOption = Annotated[
    str,
    typer.Option(
        "--run",
        "-r",
        metavar="RUN",
        envvar="RINGASYNC_RUN",
        help="Name or folder of the run, or its TOML file; default: the run started last.",
    ),
]
RunsDirOption = Annotated[
    Path, typer.Option("--runs-dir", metavar="DIR", help="Folder that holds the runs.")
]
