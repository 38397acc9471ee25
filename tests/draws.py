"""Hypothesis, drawing the same whatever else is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis.internal.cache import LRUCache
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants


@contextmanager
def same_draws() -> Iterator[None]:
    """Hypothesis mixes constants of the modules that are loaded into what it draws, so that a seed
    would mean other examples after other tests. It has no setting for that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(providers, "_get_local_constants", Constants)
        patch.setattr(providers, "CONSTANTS_CACHE", LRUCache(1024))
        yield
