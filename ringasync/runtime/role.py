"""What every role's ``__main__`` shares: the command line, the event loop, the exit code."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvloop

from ringasync.broker.address import with_tls
from ringasync.config.load import load_config
from ringasync.config.schema import Config
from ringasync.errors import ConfigError, RingError
from ringasync.runtime.shutdown import Shutdown, watch_parent

REDIS_URL_VARIABLE = "RINGASYNC_REDIS_URL"
EMBEDDED_URL_FILE = Path("redis") / "redis.url"
"""Where the embedded Redis of a run leaves its address, below the run's folder."""


@dataclass(frozen=True, slots=True)
class RoleArgs:
    """A role's command line, resolved: ``model`` is a folder or hub name, never ``starter``."""

    config: Config
    config_path: Path
    redis_url: str
    model: str


def role_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """The parser of ``python -m workers`` and its like; a role may add its own options."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("config", type=Path, help="TOML file of the run")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one setting, e.g. --set loss.mismatch=tis (may be repeated)",
    )
    parser.add_argument(
        "--redis-url",
        default="",
        help=f"address of the broker (default: ${REDIS_URL_VARIABLE}, then redis.url)",
    )
    parser.add_argument("--model", default="", help="starting model (default: model.path)")
    return parser


def resolve_args(namespace: argparse.Namespace) -> RoleArgs:
    """Load the configuration and settle what it leaves open.

    Raises:
        ConfigError: the file is wrong, the run's embedded Redis is not up, or no model is named.
    """
    path: Path = namespace.config
    config = load_config(path, namespace.overrides)
    redis_url = resolve_redis_url(config, namespace.redis_url)
    model = namespace.model or config.model.path
    if model == "starter":
        raise ConfigError(
            f"{path}: model.path is 'starter', which `ringasync up` builds; "
            "give the built model's folder by --model"
        )
    return RoleArgs(config, path, redis_url, model)


def resolve_redis_url(config: Config, given: str = "") -> str:
    """The broker's address: ``given``, then the environment, then the configuration.

    For ``embedded`` it is what ``ringasync up`` wrote into the run's folder.

    Raises:
        ConfigError: the run uses an embedded Redis that is not up.
        BrokerRefusedError: there are files for TLS, but the address does not use it.
    """
    url = given or os.environ.get(REDIS_URL_VARIABLE, "") or config.redis.url
    if url != "embedded":
        tls = config.redis
        return with_tls(url, tls.tls_ca_file, tls.tls_cert_file, tls.tls_key_file)
    return read_embedded_url(config.run_dir)


def read_embedded_url(run_dir: Path) -> str:
    """The address that the embedded Redis of this run left in ``redis/redis.url``.

    Raises:
        ConfigError: no such file: the run is not up.
    """
    file = run_dir / EMBEDDED_URL_FILE
    try:
        return file.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise ConfigError(
            f"run {run_dir.name!r} is not up: {file} does not exist. Start it with "
            "`ringasync up CONFIG`, or give the broker's address by --redis-url"
        ) from None


def run_role(main: Callable[[Shutdown], Awaitable[int]]) -> int:
    """Run a role to its end on uvloop, with signals and the parent's watchdog in place.

    Returns the process's exit code: what ``main`` returns, or a ``RingError``'s own code after one
    line on stderr. Any other exception is a bug and leaves with its traceback.
    """

    async def body() -> int:
        shutdown = Shutdown()
        shutdown.install()
        watch_parent()
        return await main(shutdown)

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(body())
    except RingError as error:
        return report_error(error)


def report_error(error: RingError, note: str = "") -> int:
    """Say on stderr, in one line, what ends this process; returns the exit code for it."""
    print(f"{type(error).__name__}: {error}{note}", file=sys.stderr, flush=True)
    return error.exit_code


def parse_role(prog: str, description: str, argv: Sequence[str] | None = None) -> RoleArgs:
    """Parse and resolve; on a wrong configuration print it and exit with its code."""
    namespace = role_parser(prog, description).parse_args(argv)
    try:
        return resolve_args(namespace)
    except RingError as error:
        raise SystemExit(report_error(error)) from None
