"""The kept bad inputs, replayed: each ends in the very error that is documented for it."""

from __future__ import annotations

import pytest

from ringasync import errors
from tests.fuzz.decoders import DECODERS, verdict
from tests.fuzz.make_corpus import BREAKERS, CORPUS, read_corpus

FEWEST = 500


@pytest.mark.parametrize("name", DECODERS)
def test_every_kept_input_ends_as_it_must(name: str) -> None:
    ended = [(type(verdict(name, data)).__name__, data) for _, data in read_corpus(name)]
    assert ended == list(read_corpus(name))


def test_there_are_enough_of_them_and_none_twice() -> None:
    inputs = {(name, data) for name in DECODERS for _, data in read_corpus(name)}
    lines = [line for file in CORPUS.glob("*.txt") for line in file.read_text().splitlines()]
    assert len(inputs) == len(lines) >= FEWEST
    assert {path.stem for path in CORPUS.iterdir()} == set(DECODERS)


def test_what_got_past_a_decoder_once_is_among_them() -> None:
    for name, inputs in BREAKERS.items():
        assert set(inputs) <= {data for _, data in read_corpus(name)}


def test_every_error_is_of_the_documented_tree() -> None:
    known = {error for name in DECODERS for error, _ in read_corpus(name)}
    assert known <= set((errors.__doc__ or "").split())
