"""``ringasync ui``: the web page of a run."""

from __future__ import annotations

from typing import Annotated

import typer

from ringasync.broker.client import Broker
from ringasync.cli.options import RedisUrlOption, RunOption, RunsDirOption
from ringasync.cli.target import config_of, running_target
from ringasync.cli.tools import RUNS_DIR, ask
from ringasync.runtime.shutdown import EXIT_INTERRUPTED


def ui(
    run: RunOption = "",
    redis_url: RedisUrlOption = "",
    runs_dir: RunsDirOption = RUNS_DIR,
    host: Annotated[str, typer.Option(help="Address to listen on; there is no login.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8642,
) -> None:
    """Show a run in the browser: reward, queues, workers, staleness, ledger, rollouts. Reads only.

    Example: ringasync ui --run demo --port 8642
    """
    target = running_target(run, redis_url, runs_dir)
    from ringasync.ui.server import serve  # the web server's libraries are for this command only

    async def body(broker: Broker) -> None:
        await serve(broker, await config_of(broker), host, port, typer.echo)

    ask(target, body)
    # Only a signal ends the page. The server repeats it, and asyncio cancels the task for SIGINT at
    # its next turn or a later one: by then it may be over, as if nobody had interrupted it.
    raise typer.Exit(EXIT_INTERRUPTED)
