"""``ringasync up``: everything one machine needs for a run, from the broker to the summary."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from ringasync.broker.client import Broker
from ringasync.config.load import config_hash, load_config, resolved_json
from ringasync.config.schema import Config
from ringasync.errors import RingError
from ringasync.observability.view import live_view
from ringasync.records.states import Phase
from ringasync.runtime.credentials import keep_out_of_sight
from ringasync.runtime.joining import connected
from ringasync.runtime.process import RoleSpec
from ringasync.runtime.progress import progress_lines
from ringasync.runtime.redis_keeper import RedisKeeper
from ringasync.runtime.role import EMBEDDED_URL_FILE, REDIS_URL_VARIABLE, resolve_redis_url
from ringasync.runtime.roles import Place, role_specs
from ringasync.runtime.runfiles import RunRecord, begin_record, claim, remove_files, write_settings
from ringasync.runtime.shutdown import EXIT_INTERRUPTED, Shutdown
from ringasync.runtime.starter import starter_of_run
from ringasync.runtime.summary import read_summary, summary_lines
from ringasync.runtime.supervisor import RestartPolicy, Supervisor


@dataclass(frozen=True, slots=True)
class UpOptions:
    """What the command line of ``up`` says."""

    config_path: Path
    overrides: tuple[str, ...] = ()
    redis_url: str = ""
    model: str = ""
    fresh: bool = False
    plain: bool = False


def say(line: str) -> None:
    """One line for the person who started the run."""
    print(line, flush=True)


class Up:
    """One ``ringasync up``. ``make_specs`` and ``policy`` are open for tests with small roles."""

    def __init__(
        self,
        options: UpOptions,
        shutdown: Shutdown,
        *,
        make_specs: Callable[[Config, Place], list[RoleSpec]] = role_specs,
        policy: RestartPolicy | None = None,
    ) -> None:
        self._options, self._shutdown = options, shutdown
        self._make_specs, self._policy = make_specs, policy
        self._config = load_config(options.config_path, options.overrides)
        self._supervisor: Supervisor | None = None
        self._redis: RedisKeeper | None = None

    def kill_at_once(self) -> None:
        """The second signal: SIGKILL to every process we started; safe in a signal handler."""
        if self._supervisor is not None:
            self._supervisor.kill_all()
        if self._redis is not None:
            self._redis.stop_at_once()

    async def run(self) -> int:
        """The whole run; returns the exit code.

        Raises:
            RingError: something stands in the way; the message names the remedy.
        """
        config = self._config
        with claim(config.run_dir):
            if self._options.fresh:
                remove_files(config.run_dir)
            begin_record(config.run_dir, self._record(config.redis.url, ""))
            async with AsyncExitStack() as stack:
                url = await stack.enter_async_context(self._broker_up())
                broker = await stack.enter_async_context(connected(config, url))
                if self._options.fresh:
                    await broker.delete_run()
                await broker.create_run(
                    resolved_json(config), config_hash(config), config.schedule.mode
                )
                if await self._is_done(broker):
                    self._say_finished()
                    return 0
                return await self._train(broker, url)

    async def _train(self, broker: Broker, url: str) -> int:
        config, options = self._config, self._options
        model = await self._model(url)
        if model is None:
            say("stopped before the starting model was built; the same command builds it anew")
            return EXIT_INTERRUPTED
        place = Place(options.config_path, options.overrides, url, model)
        self._record(url, model).write(config.run_dir)
        write_settings(config)
        specs = self._make_specs(config, place)
        self._supervisor = Supervisor(specs, config.run_dir / "logs", say=say, policy=self._policy)
        say(
            f"run {config.run.name}: {', '.join(spec.name for spec in specs)}; "
            f"Redis {url}; files in {config.run_dir}"
        )
        view_stop = asyncio.Event()
        view = asyncio.create_task(self._show(broker, view_stop))
        try:
            code = await self._supervisor.run(self._shutdown, lambda: self._is_done(broker))
        finally:
            view_stop.set()
            await view
        for line in summary_lines(read_summary(config.run_dir) or {}, config.run_dir):
            say(line)
        if code == EXIT_INTERRUPTED:
            say("stopped before the end; the same command goes on from here")
        return code

    async def _show(self, broker: Broker, stop: asyncio.Event) -> None:
        # A view that breaks must not take the run with it; the error is still shown.
        try:
            if sys.stdout.isatty() and not self._options.plain:
                await live_view(broker, self._config, stop)
            else:
                await progress_lines(broker, self._config, stop, say)
        except Exception as error:
            say(f"the view ended with {type(error).__name__}: {error}; the run goes on")

    async def _model(self, url: str) -> str | None:
        """Name or folder of the starting model; built when the configuration asks for it."""
        config, options = self._config, self._options
        named = options.model or config.model.path
        if named != "starter":
            return named
        return await starter_of_run(config, options.config_path, options.overrides, self._shutdown)

    @asynccontextmanager
    async def _broker_up(self) -> AsyncIterator[str]:
        """The broker's address; an embedded Redis lives, watched, as long as this context."""
        config, options = self._config, self._options
        given = options.redis_url or os.environ.get(REDIS_URL_VARIABLE, "")
        if given:
            os.environ[REDIS_URL_VARIABLE] = given = keep_out_of_sight(given)
        if (given or config.redis.url) != "embedded":
            yield resolve_redis_url(config, given)
            return
        folder = config.run_dir / EMBEDDED_URL_FILE.parent
        self._redis = RedisKeeper(folder, config.redis.maxmemory_bytes, say)
        async with self._redis.running() as embedded_url:
            yield embedded_url

    async def _is_done(self, broker: Broker) -> bool:
        try:
            return (await broker.run_meta()).get("phase") == Phase.DONE
        except RingError as error:
            if type(error) is not RingError:
                raise
            # Redis came back empty; the coordinator makes the run anew from its checkpoint.
            return False

    def _record(self, url: str, model: str) -> RunRecord:
        return RunRecord.of(self._config, self._options.config_path, url, model)

    def _say_finished(self) -> None:
        name, path = self._config.run.name, self._options.config_path
        say(
            f"run {name} is finished (its files are in {self._config.run_dir}). To train again "
            f"from the start: ringasync up {path} --fresh; beside it: --set run.name=another"
        )
