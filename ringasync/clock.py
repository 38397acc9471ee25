"""The clock of this process, for what is measured from one moment to another."""

from __future__ import annotations

import time


def monotonic_s() -> float:
    """Seconds by ``time.monotonic``, looked up at each call.

    As a default argument ``time.monotonic`` itself would be bound when its module loads, and a
    simulation that puts its own clock there would be passed by.
    """
    return time.monotonic()
