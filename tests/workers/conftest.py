"""A run with real Redis, scripted engines and file weights."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from .world import World

MakeWorld = Callable[..., Coroutine[Any, Any, World]]


@pytest.fixture
async def make_world(any_redis: Any, run_name: str, tmp_path: Path) -> AsyncIterator[MakeWorld]:
    """Make the test's run: ``await make_world(mode="rounds", **worker_settings)``."""
    worlds: list[World] = []

    async def make(**settings: Any) -> World:
        url = settings.pop("url", any_redis.url)
        world = await World.make(url, run_name, tmp_path, **settings)
        worlds.append(world)
        return world

    yield make
    for world in worlds:
        await world.close()
