"""Roles load their packages without the garbage collector, and have it back afterwards."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from ringasync.runtime.heavy_imports import heavy_imports


@pytest.fixture(autouse=True)
def _collector_as_before() -> Iterator[None]:
    was_on = gc.isenabled()
    yield
    gc.unfreeze()
    (gc.enable if was_on else gc.disable)()


def test_the_collector_stands_still_inside_and_passes_over_what_was_loaded() -> None:
    gc.enable()
    frozen = gc.get_freeze_count()
    with heavy_imports():
        assert not gc.isenabled()
        loaded: list[object] = [[number] for number in range(1000)]
        assert gc.get_freeze_count() == frozen
    assert gc.isenabled()
    assert gc.get_freeze_count() >= frozen + len(loaded)


def test_a_package_that_is_missing_leaves_the_collector_on() -> None:
    gc.enable()
    with pytest.raises(ImportError), heavy_imports():
        import no_such_package_of_ours  # type: ignore[import-not-found]  # noqa: F401
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with heavy_imports():
        pass
    assert not gc.isenabled()
