"""Whatever arrives: it is decoded, or ends in an error that the decoder's documentation names."""

from __future__ import annotations

import tempfile
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.fuzz.decoders import DECODERS, verdict
from tests.fuzz.mutate import mutated

MAX_EXAMPLES = 100
_SETTINGS = settings(
    max_examples=MAX_EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.mark.parametrize("name", DECODERS)
def test_what_is_valid_is_read(name: str) -> None:
    """Else the other tests would show little."""
    for seed in DECODERS[name].seeds:
        with tempfile.TemporaryDirectory() as folder:
            DECODERS[name].decode(seed, Path(folder))


@pytest.mark.parametrize("name", DECODERS)
@_SETTINGS
@given(random=st.randoms(use_true_random=False))
def test_something_valid_that_was_changed(name: str, random: Random) -> None:
    decoder = DECODERS[name]
    check(name, mutated(decoder.form, random.choice(decoder.seeds), random))


@pytest.mark.parametrize("name", DECODERS)
@settings(_SETTINGS, max_examples=50)
@given(data=st.binary(max_size=200))
@example(b"")
@example(b"\xff" * 64)
@example(b"[" * 100_000)
@example(b"\x91" * 100_000)
@example(b"9" * 10_000)
def test_any_bytes(name: str, data: bytes) -> None:
    check(name, data)


def check(name: str, data: bytes) -> None:
    """Decode; a documented error is fine."""
    error = verdict(name, data)
    assert error is None or str(error), "an error without a word"
