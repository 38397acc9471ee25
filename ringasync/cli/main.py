"""The ``ringasync`` command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from ringasync import __version__
from ringasync.cli import manage, roles, tools
from ringasync.cli.acl_command import acl
from ringasync.cli.config_command import config
from ringasync.cli.export_command import export
from ringasync.cli.init_command import init
from ringasync.cli.replay_command import replay
from ringasync.cli.ui_command import ui
from ringasync.errors import RingError

EXIT_CODES = "\n\n".join(
    (
        "Exit codes:",
        "0 done; 1 not done, accounts out of balance (audit) or other losses (replay);",
        "2 configuration or command line;",
        "3 surroundings: Redis unreachable or refused, another schema or configuration;",
        "4 another process has the role; 5 lost the right to act;",
        "6 inference engine; 7 training, journal or checkpoint; 70 a bug;",
        "130 stopped by a signal before the end; 128+N a role was killed by signal N.",
    )
)

app = typer.Typer(
    help="Train a language model by reinforcement learning while it is generating.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ringasync {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Version.")
    ] = False,
) -> None:
    del version


def _register(panel: str, *commands: Callable[..., None]) -> None:
    for command in commands:
        app.command(rich_help_panel=panel, epilog=EXIT_CODES)(command)


_register("Run", roles.up, roles.coordinator, roles.worker, roles.learner, roles.grader)
_register("Run", roles.redis)
_register("Look", tools.top, tools.inspect, tools.samples, tools.audit, tools.report, replay)
_register("Look", tools.health, ui)
_register("Manage", init, config, manage.pause, manage.resume, manage.rm, export, acl)


def main() -> None:
    """Entry point: a deliberate error is a message and an exit code, a bug keeps its traceback."""
    try:
        app()
    except RingError as error:
        print(f"ringasync: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
