"""The chart, rendered with any values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .chart import Render


@pytest.fixture(scope="session")
def render() -> Render:
    """``deploy/render.py``."""
    from .chart import load_render

    return load_render()
