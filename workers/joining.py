"""Joining a run that its coordinator may not have created yet."""

from __future__ import annotations

from ringasync.broker.client import Broker
from ringasync.config.load import config_hash
from ringasync.config.schema import Config
from ringasync.errors import RingError
from ringasync.observability.log import get_logger
from ringasync.runtime.shutdown import Shutdown

POLL_S = 0.5

log = get_logger()


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
