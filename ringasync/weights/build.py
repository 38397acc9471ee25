"""Make the transport that a configuration asks for."""

from __future__ import annotations

import os
from typing import Protocol

from redis.asyncio import Redis

from ringasync.config.schema import Config
from ringasync.errors import ConfigError
from ringasync.weights.file_transport import FileTransport
from ringasync.weights.redis_transport import RedisTransport
from ringasync.weights.transport import Transport


class HasClient(Protocol):
    """What is asked of the broker: its connection, for small models on the main Redis."""

    @property
    def client(self) -> Redis:
        """The redis-py client, which does not decode replies."""
        ...


def make_transport(config: Config, broker: HasClient) -> Transport:
    """The transport of ``weights.transport``; close it when done.

    ``nccl`` is the file transport: what is pulled from the learner comes beside it (``peer``).
    The password of a second Redis is taken from its URL or ``RINGASYNC_WEIGHTS_REDIS_PASSWORD``,
    else ``RINGASYNC_REDIS_PASSWORD``. Raises ``ConfigError`` on a URL that is none.
    """
    weights = config.weights
    if weights.transport != "redis":
        return FileTransport(config.run_dir / "weights", weights.keep_versions)
    if not weights.redis_url:
        return RedisTransport(broker.client, config.run.name, keep_versions=weights.keep_versions)
    return RedisTransport(
        _second_redis(weights.redis_url),
        config.run.name,
        keep_versions=weights.keep_versions,
        own_redis=True,
    )


def _second_redis(url: str) -> Redis:
    environment = os.environ
    password = environment.get("RINGASYNC_WEIGHTS_REDIS_PASSWORD") or environment.get(
        "RINGASYNC_REDIS_PASSWORD"
    )
    try:
        client = Redis.from_url(url, decode_responses=False)
    except ValueError as error:
        raise ConfigError(
            f"weights.redis_url = {url!r} is no Redis URL ({error}): write redis://HOST:PORT/0"
        ) from error
    settings = client.connection_pool.connection_kwargs
    if password and not settings.get("password"):
        settings["password"] = password
    return client
