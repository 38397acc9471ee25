"""Segments survive the wire exactly, and nothing broken is read as a segment."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringasync.errors import SchemaError
from ringasync.records.segment import Segment, decode_segment, encode_segment, policy_segment

_LOGPROBS = st.floats(min_value=-200, max_value=0, width=32)
_TOKENS = st.lists(st.tuples(st.integers(0, 2**31 - 1), _LOGPROBS), min_size=1, max_size=80)


@given(_TOKENS, st.integers(0, 10**6), st.integers(0, 10**6))
def test_round_trip_is_exact(tokens: list[tuple[int, float]], start: int, version: int) -> None:
    ids, logprobs = [t for t, _ in tokens], [p for _, p in tokens]
    back = decode_segment(encode_segment(policy_segment(start, version, ids, logprobs)))
    assert (back.kind, back.start, back.policy_version) == ("policy", start, version)
    assert back.token_ids.tolist() == ids
    assert back.behavior_logprobs.dtype == np.float32
    assert back.behavior_logprobs.tolist() == logprobs
    assert back.end == start + len(ids)


def test_small_vocabularies_take_at_most_ten_bytes_a_token() -> None:
    segment = policy_segment(640, 12, list(range(64)), [-0.5] * 64)
    assert len(encode_segment(segment)) / 64 <= 7
    large = policy_segment(640, 12, [151_000] * 64, [-0.5] * 64)
    assert len(encode_segment(large)) / 64 <= 9


def test_environment_segments_carry_no_logprobs() -> None:
    ids = np.asarray([5, 6], np.int32)
    segment = Segment("environment", 3, 1, ids, np.zeros(0, np.float32))
    back = decode_segment(encode_segment(segment))
    assert back.kind == "environment"
    assert back.behavior_logprobs.shape == (0,)
    with pytest.raises(SchemaError, match="log-probs"):
        encode_segment(Segment("environment", 3, 1, ids, np.zeros(2, np.float32)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema 2"),
        ({"schema": None}, "schema None"),
        ({"k": 7}, "field"),
        ({"n": 3}, "says 3 tokens and holds 2"),
        ({"s": -1}, "field"),
        ({"s": True}, "field"),
        ({"v": "4"}, "field"),
        ({"w": 3}, "field"),
        ({"t": b"\x01"}, "field"),
        ({"l": np.asarray([-1], "<f4").tobytes()}, "log-probs"),
        ({"l": np.asarray([-1, np.nan], "<f4").tobytes()}, "NaN"),
        ({"l": np.asarray([-1, -np.inf], "<f4").tobytes()}, "NaN"),
        ({"t": b"", "l": b"", "n": 0}, "empty"),
        ({"t": np.asarray([-1, 3], "<i4").tobytes(), "w": 4}, "negative"),
    ],
)
def test_broken_fields_are_refused(change: dict[str, object], message: str) -> None:
    fields = msgpack.unpackb(encode_segment(policy_segment(0, 1, [1, 2], [-0.1, -0.2])))
    with pytest.raises(SchemaError, match=message):
        decode_segment(msgpack.packb(fields | change))


@given(st.data())
def test_truncated_or_foreign_bytes_never_pass(data: st.DataObject) -> None:
    whole = encode_segment(policy_segment(0, 1, [1, 2, 3], [-0.1, -0.2, -0.3]))
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(SchemaError):
        decode_segment(whole[:cut])
    with pytest.raises(SchemaError):
        decode_segment(data.draw(st.binary(max_size=40)))
