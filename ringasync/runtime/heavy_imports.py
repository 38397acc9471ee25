"""Loading torch, transformers and vLLM in less time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def heavy_imports() -> Iterator[None]:
    """No garbage collection inside: it would look hundreds of times through modules that stay, a
    fifth of the seconds that a role takes to start. Afterwards it passes them over for good."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
