"""Serves the page until a signal comes."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn

from ringasync.broker.client import Broker
from ringasync.config.schema import Config
from ringasync.errors import EnvironmentRefusedError
from ringasync.ui.app import LOOPBACK, make_app

_LEAVE_S = 3
"""How long open connections may hold up the end."""


def bound(host: str, port: int) -> socket.socket:
    """A socket on the address. Raises ``EnvironmentRefusedError`` when it cannot be had."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind(address)
            found.listen()  # from now on whoever comes waits: the address may be told
        except OSError:
            found.close()
            raise
        return found
    except OSError as error:
        raise EnvironmentRefusedError(
            f"{host}:{port} cannot be listened on ({error.strerror or error}): "
            "choose another by --host or --port"
        ) from None


async def serve(
    broker: Broker, config: Config, host: str, port: int, say: Callable[[str], None]
) -> None:
    """Serve the run's page.

    Consumes: GET requests. Produces: pages, of what Redis holds at that moment. Waits for:
    requests. Ended by: SIGINT or SIGTERM.
    """
    with bound(host, port) as listening:
        app = make_app(broker, config, any_host=host not in LOOPBACK)
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                server_header=False,
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=_LEAVE_S,
            )
        )
        say(f"run {config.run.name}: http://{host}:{listening.getsockname()[1]}/ (Ctrl-C ends it)")
        if host not in LOOPBACK:
            say("whoever reaches this address sees the run, prompts and answers too: no login")
        await server.serve(sockets=[listening])
