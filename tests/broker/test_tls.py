"""TLS to a real Redis, and the refusal of a server that strangers can use."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from redis.asyncio import Redis

from ringasync.broker.address import with_tls
from ringasync.broker.client import Broker
from ringasync.config.load import load_config
from ringasync.config.schema import Config
from ringasync.errors import BrokerRefusedError, BrokerUnreachableError, ConfigError
from ringasync.runtime.role import resolve_redis_url
from ringasync.weights.build import make_transport
from tests.conftest import RedisServer
from tests.redis_process import redis_process
from tests.tls_kit import Authority, tls_front

DEMO = Path(__file__).parents[2] / "configs" / "demo.toml"
PASSWORD = "a-password-of-the-test"  # noqa: S105
BUDGET_S = 20.0


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def plain_port(any_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    folder = tmp_path_factory.mktemp("behind-tls")
    with redis_process(any_redis.binary, folder, "--requirepass", PASSWORD) as port:
        yield port


async def connect(url: str) -> None:
    """Connect, do something, leave."""
    broker = await Broker.connect(url, "tls", password=PASSWORD, retry_budget_s=BUDGET_S)
    await broker.create_run("", "h")
    assert (await broker.run_meta())["config_hash"] == "h"
    await broker.close()


async def refusal(url: str) -> str:
    """What a connection is refused with; at once, not after the retries."""
    began = time.monotonic()
    with pytest.raises(BrokerRefusedError) as error:
        await connect(url)
    assert time.monotonic() - began < BUDGET_S / 2
    return str(error.value)


async def test_a_certificate_of_our_ca_is_trusted_and_no_other(
    plain_port: int, authority: Authority, tmp_path: Path
) -> None:
    context = authority.server_context("127.0.0.1", asks_client=False)
    with tls_front(plain_port, context) as port:
        url = f"rediss://127.0.0.1:{port}/0"
        await connect(with_tls(url, str(authority.ca_file), "", ""))
        assert "redis.tls_ca_file must hold the CA" in await refusal(url)
        stranger = Authority.make(tmp_path / "other")
        assert "no TLS" in await refusal(with_tls(url, str(stranger.ca_file), "", ""))


async def test_a_certificate_for_another_host_is_refused(
    plain_port: int, authority: Authority
) -> None:
    context = authority.server_context("redis.example", asks_client=False)
    with tls_front(plain_port, context) as port:
        url = with_tls(f"rediss://127.0.0.1:{port}/0", str(authority.ca_file), "", "")
        assert "must be for this host name" in await refusal(url)


async def test_a_server_may_ask_for_our_certificate(plain_port: int, authority: Authority) -> None:
    context = authority.server_context("127.0.0.1", asks_client=True)
    cert, key = map(str, authority.client_files())
    with tls_front(plain_port, context) as port:
        url, ca = f"rediss://127.0.0.1:{port}/0", str(authority.ca_file)
        await connect(with_tls(url, ca, cert, key))
        with pytest.raises(BrokerUnreachableError, match=r"certificate, set redis\.tls_cert_file"):
            await Broker.connect(with_tls(url, ca, "", ""), "tls", retry_budget_s=0.3)


async def test_what_would_weaken_tls_is_refused(authority: Authority) -> None:
    ca = str(authority.ca_file)
    with pytest.raises(BrokerRefusedError, match=r"tls_ca_file is set.*write rediss://"):
        with_tls("redis://10.0.0.1:6379/0", ca, "", "")
    for option in ("ssl_cert_reqs=none", "ssl_check_hostname=false"):
        assert "switch the check" in await refusal(f"rediss://127.0.0.1:1/0?{option}")
    missing = with_tls("rediss://127.0.0.1:1/0", "/no/such/ca.pem", "", "")
    assert "redis.tls_ca_file = '/no/such/ca.pem' is no file" in await refusal(missing)


def config_with(*overrides: str) -> Config:
    return load_config(DEMO, overrides)


def test_settings_reach_the_address_and_hold_no_password(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RINGASYNC_REDIS_URL", raising=False)
    config = config_with(
        "redis.url=rediss://db.example:6380/0", f"redis.tls_ca_file={authority.ca_file}"
    )
    url = resolve_redis_url(config)
    assert url.startswith("rediss://db.example:6380/0?ssl_ca_certs=")
    assert resolve_redis_url(config, url) == url
    for key in ("redis.url", "weights.redis_url"):
        with pytest.raises(ConfigError, match="set RINGASYNC_REDIS_PASSWORD"):
            config_with(f"{key}=redis://me:secret@db:6379/0")


def own_address() -> str:
    """An address of this machine that others could reach."""
    for addresses in psutil.net_if_addrs().values():
        for one in addresses:
            if one.family is socket.AF_INET and not one.address.startswith("127."):
                return str(one.address)
    pytest.skip("this machine has no address besides loopback")


OPEN = ("--bind", "0.0.0.0", "--protected-mode", "no")  # noqa: S104 - that is what is refused


async def test_a_server_that_strangers_can_use_is_refused_whatever_its_address_here(
    any_redis: RedisServer, tmp_path: Path
) -> None:
    with redis_process(any_redis.binary, tmp_path, *OPEN) as port:
        for password in (None, PASSWORD):
            with pytest.raises(BrokerRefusedError, match=r"bind 0\.0\.0\.0.*RINGASYNC_REDIS_PASSW"):
                await Broker.connect(f"redis://127.0.0.1:{port}/0", "open", password=password)
        url = f"redis://{own_address()}:{port}/0"
        with pytest.raises(BrokerRefusedError, match="reachable from other machines"):
            await Broker.connect(url, "open")
        # ACL users do not help while `default` needs no password.
        async with Redis(port=port) as admin:
            await admin.acl_setuser("me", enabled=True, passwords=[f"+{PASSWORD}"])
            await admin.execute_command("ACL", "SETUSER", "me", "allkeys", "allcommands")  # type: ignore[no-untyped-call]
        for address in (url, f"redis://127.0.0.1:{port}/0"):
            with pytest.raises(BrokerRefusedError, match="without a password"):
                await Broker.connect(address, "open", username="me", password=PASSWORD)
            with pytest.raises(BrokerRefusedError, match="without a password"):
                await Broker.connect(address.replace("//", f"//me:{PASSWORD}@"), "open")


async def test_with_a_password_an_open_address_is_welcome(
    any_redis: RedisServer, tmp_path: Path
) -> None:
    with redis_process(any_redis.binary, tmp_path, *OPEN, "--requirepass", PASSWORD) as port:
        await connect(f"redis://{own_address()}:{port}/0")


async def test_a_second_redis_for_weights_needs_a_password_too(
    plain_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RINGASYNC_REDIS_PASSWORD", "RINGASYNC_WEIGHTS_REDIS_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    url = "redis://10.0.0.9:6379/0"
    config = config_with("weights.transport=redis", f"weights.redis_url={url}")
    broker = await Broker.connect(f"redis://127.0.0.1:{plain_port}/0", "w", password=PASSWORD)
    with pytest.raises(BrokerRefusedError, match="RINGASYNC_WEIGHTS_REDIS_PASSWORD"):
        make_transport(config, broker)
    monkeypatch.setenv("RINGASYNC_WEIGHTS_REDIS_PASSWORD", PASSWORD)
    await make_transport(config, broker).close()
    await broker.close()
