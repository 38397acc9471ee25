"""How a role comes to the broker: the connection, and a run that may not exist yet."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ringasync.broker.client import Broker
from ringasync.config.load import config_hash
from ringasync.config.schema import Config
from ringasync.errors import RingError
from ringasync.observability.log import get_logger
from ringasync.runtime.credentials import redis_credentials, sentinel_password
from ringasync.runtime.shutdown import Shutdown

POLL_S = 0.3

log = get_logger()


@asynccontextmanager
async def connected(config: Config, url: str) -> AsyncIterator[Broker]:
    """A broker client of this run, closed at the end."""
    settings = config.redis
    async with broker_client(
        url, config.run.name, settings.connect_timeout_s, settings.retry_budget_s
    ) as broker:
        yield broker


@asynccontextmanager
async def broker_client(
    url: str, run: str, connect_timeout_s: float, retry_budget_s: float
) -> AsyncIterator[Broker]:
    """A broker client, closed at the end; user and password come from the environment."""
    username, password = redis_credentials()
    broker = await Broker.connect(
        url,
        run,
        username=username,
        password=password,
        sentinel_password=sentinel_password(),
        connect_timeout_s=connect_timeout_s,
        retry_budget_s=retry_budget_s,
    )
    try:
        yield broker
    finally:
        await broker.close()


async def join_when_created(broker: Broker, config: Config, shutdown: Shutdown) -> bool:
    """Join the run; False when a stop was requested first.

    Waits for: the coordinator to create the run. Unblocked by: the run, or a shutdown. Raises
    ``JoinRefusedError`` when schema or configuration differ from the run's.
    """
    said = False
    while not shutdown.is_requested:
        try:
            await broker.join_run(config_hash(config))
        except RingError as error:
            if type(error) is not RingError:  # its subclasses say that waiting does not help
                raise
            if not said:
                log.info("waiting for the coordinator", why=str(error))
            said = True
            await shutdown.sleep(POLL_S)
        else:
            return True
    return False
