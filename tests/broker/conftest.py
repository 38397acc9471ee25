"""Fixtures of the broker's tests."""

from __future__ import annotations

import pytest

from ringasync.broker.client import Broker

from .kit import Kit


@pytest.fixture
async def kit(broker: Broker) -> Kit:
    """A broker with locks held, version 1 published and a simulated clock."""
    return await Kit.make(broker)
