"""One served run for all tests that do not change it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import RedisServer
from tests.ui.site import Site, filled


@pytest.fixture(scope="session")
def site(any_redis: RedisServer) -> Iterator[Site]:
    """The page of a run that holds text that means harm."""
    with filled(any_redis.url, "t-ui") as served:
        yield served
