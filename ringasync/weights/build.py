"""Make the transport that a configuration asks for."""

from __future__ import annotations

import os
from typing import Protocol
from urllib.parse import urlsplit

from redis.asyncio import Redis

from ringasync.broker.address import require_password, with_tls
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
    else ``RINGASYNC_REDIS_PASSWORD``; its user from ``RINGASYNC_WEIGHTS_REDIS_USERNAME``. Raises
    ``ConfigError`` on a URL that is none, ``BrokerRefusedError`` when others reach it and there is
    no password.
    """
    weights = config.weights
    if weights.transport != "redis":
        return FileTransport(config.run_dir / "weights", weights.keep_versions)
    if not weights.redis_url:
        return RedisTransport(broker.client, config.run.name, keep_versions=weights.keep_versions)
    return RedisTransport(
        _second_redis(config),
        config.run.name,
        keep_versions=weights.keep_versions,
        own_redis=True,
    )


def _second_redis(config: Config) -> Redis:
    url, environment, tls = config.weights.redis_url, os.environ, config.redis
    password = environment.get("RINGASYNC_WEIGHTS_REDIS_PASSWORD") or environment.get(
        "RINGASYNC_REDIS_PASSWORD"
    )
    require_password(url, password, "weights.redis_url", "RINGASYNC_WEIGHTS_REDIS_PASSWORD")
    if urlsplit(url).scheme == "rediss":
        url = with_tls(url, tls.tls_ca_file, tls.tls_cert_file, tls.tls_key_file)
    try:
        client = Redis.from_url(url, decode_responses=False)
    except ValueError as error:
        raise ConfigError(
            f"weights.redis_url = {url!r} is no Redis URL ({error}): write redis://HOST:PORT/0"
        ) from error
    settings = client.connection_pool.connection_kwargs
    if password and not settings.get("password"):
        settings["password"] = password
        if user := environment.get("RINGASYNC_WEIGHTS_REDIS_USERNAME"):
            settings["username"] = user
    return client
