"""Which run a tool is about, and a connection to its broker that fails fast and clearly."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from ringasync.broker.client import Broker
from ringasync.broker.embedded import EmbeddedRedis, live_url
from ringasync.config.load import config_from_json, load_config
from ringasync.config.schema import Config
from ringasync.errors import ConfigError
from ringasync.runtime.joining import broker_client
from ringasync.runtime.role import EMBEDDED_URL_FILE
from ringasync.runtime.runfiles import claim, newest_run, read_record

PATIENCE_S = 3.0
"""How long a tool waits for Redis: a person is looking at the terminal."""


@dataclass(frozen=True, slots=True)
class Target:
    """A run to look at. ``redis_url`` empty: an embedded Redis in ``run_dir`` that is not up."""

    name: str
    run_dir: Path
    redis_url: str


def resolve_target(run: str, redis_url: str, runs_dir: Path) -> Target:
    """Find the run by name, folder or TOML file; without any, the one started last.

    Raises:
        ConfigError: no such run is known here and no broker's address is given.
    """
    if run.endswith(".toml"):
        config = load_config(Path(run))
        return _target(config.run.name, config.run_dir, redis_url or _configured_url(config))
    if run:
        folder = _named(run, runs_dir)
        return _target(folder.name, folder, redis_url)
    newest = newest_run(runs_dir)
    if newest is None:
        raise ConfigError(
            f"no run in {runs_dir}/: start one with `ringasync up CONFIG`, or name it by --run "
            "(and its broker by --redis-url when it runs on another machine)"
        )
    return _target(newest.name, newest, redis_url)


def running_target(run: str, redis_url: str, runs_dir: Path) -> Target:
    """``resolve_target`` for what can only be asked of a run that is up; else ``ConfigError``."""
    target = resolve_target(run, redis_url, runs_dir)
    if not target.redis_url:
        raise ConfigError(f"run {target.name!r} is not up; see `ringasync report {target.name}`")
    return target


def resolve_run_dir(run: str, runs_dir: Path) -> Path:
    """The folder of a run whose files are here; its broker need not be.

    Raises:
        ConfigError: there is no such run in ``runs_dir``.
    """
    folder = _named(run, runs_dir) if run else newest_run(runs_dir)
    if folder is None or read_record(folder) is None:
        raise ConfigError(_no_such_run(run, runs_dir))
    return folder


def _named(run: str, runs_dir: Path) -> Path:
    return Path(run) if "/" in run and Path(run).is_dir() else runs_dir / run


def _no_such_run(name: str, runs_dir: Path) -> str:
    known = ", ".join(sorted(path.parent.name for path in runs_dir.glob("*/run.json"))) or "none"
    what = f"no run {name!r}" if name else "no run"
    return f"{what} in {runs_dir}/ (there: {known})"


def _configured_url(config: Config) -> str:
    return "" if config.redis.url == "embedded" else config.redis.url


def _target(name: str, run_dir: Path, redis_url: str) -> Target:
    if redis_url:
        return Target(name, run_dir, redis_url)
    embedded = run_dir / EMBEDDED_URL_FILE.parent
    if embedded.is_dir():
        return Target(name, run_dir, live_url(embedded) or "")
    record = read_record(run_dir)
    if record is None:
        raise ConfigError(
            _no_such_run(name, run_dir.parent) + "; give its broker's address by --redis-url"
        )
    return Target(name, run_dir, record.redis_url)


@asynccontextmanager
async def broker_of(target: Target) -> AsyncIterator[Broker]:
    """A client of the run's broker.

    When the run is over and its embedded Redis with it, that Redis is started for the time of the
    question, so that a finished run can still be looked at.

    Raises:
        BrokerUnreachableError: no answer within a few seconds.
        RingError: Redis answers but knows no such run.
    """
    async with AsyncExitStack() as stack:
        url = target.redis_url or await stack.enter_async_context(_reading(target))
        broker = await stack.enter_async_context(
            broker_client(url, target.name, PATIENCE_S, PATIENCE_S)
        )
        await broker.run_meta()  # refuses when there is no such run
        yield broker


@asynccontextmanager
async def _reading(target: Target) -> AsyncIterator[str]:
    with claim(target.run_dir):
        redis = EmbeddedRedis(target.run_dir / EMBEDDED_URL_FILE.parent)
        await redis.start()
        try:
            yield redis.url
        finally:
            await redis.stop()


async def config_of(broker: Broker) -> Config:
    """The configuration the run was started with, as stored with it."""
    return config_from_json((await broker.run_meta())["config"])
