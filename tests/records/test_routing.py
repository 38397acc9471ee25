"""Routed experts on the wire: exact, aligned with their tokens, refused when they cannot be."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ringasync.errors import SchemaError
from ringasync.records.routing import (
    RoutedRows,
    join_rows,
    known_rows,
    last_rows,
    rows_dtype,
    signed_rows,
    unpack_rows,
)
from ringasync.records.segment import Segment, decode_segment, encode_segment, policy_segment
from ringasync.records.trajectory import join_segments


def rows(*values: int, dtype: type[np.unsignedinteger] = np.uint8) -> RoutedRows:
    """One layer, one expert a token: row i is ``values[i]``."""
    return np.asarray(values, dtype).reshape(-1, 1, 1)


def segment(start: int, count: int, routed: RoutedRows | None, version: int = 1) -> Segment:
    return policy_segment(start, version, list(range(count)), [-0.5] * count, routed)


def values(routed: RoutedRows | None) -> list[int]:
    assert routed is not None
    found: list[int] = routed[:, 0, 0].tolist()
    return found


@st.composite
def routed_segments(draw: st.DrawFn) -> Segment:
    count, start = draw(st.integers(1, 12)), draw(st.sampled_from([0, 7]))
    context = draw(st.integers(0, 5)) if start == 0 else 0
    shape = (context + count, draw(st.integers(1, 4)), draw(st.integers(1, 3)))
    dtype = draw(st.sampled_from([np.uint8, np.uint16]))
    return segment(start, count, draw(hnp.arrays(dtype, shape)))


@given(routed_segments())
def test_round_trip_is_exact(one: Segment) -> None:
    back = decode_segment(encode_segment(one)).routed_experts
    assert back is not None
    assert one.routed_experts is not None
    assert back.dtype == one.routed_experts.dtype
    assert np.array_equal(back, one.routed_experts)


def test_rows_are_little_endian_bytes() -> None:
    wide = rows(1, 258, dtype=np.uint16)
    fields = msgpack.unpackb(encode_segment(segment(0, 2, wide)))
    assert fields["e"] == [2, 1, 1, b"\x01\x00\x02\x01"]


def test_a_segment_without_routing_is_what_it_was() -> None:
    """No byte more, and segments of builds that knew no routing are read."""
    plain = encode_segment(segment(0, 2, None))
    expected = {
        **{"schema": 1, "k": 0, "s": 0, "v": 1, "n": 2, "w": 2},
        "t": np.asarray([0, 1], "<u2").tobytes(),
        "l": np.asarray([-0.5, -0.5], "<f4").tobytes(),
    }
    assert plain == msgpack.packb(expected)
    assert decode_segment(plain).routed_experts is None


def test_a_token_costs_layers_times_experts_bytes() -> None:
    with_rows = segment(64, 64, np.zeros((64, 48, 8), np.uint8))
    more = len(encode_segment(with_rows)) - len(encode_segment(segment(64, 64, None)))
    assert 48 * 8 * 64 <= more <= 48 * 8 * 64 + 16


@pytest.mark.parametrize(
    "field",
    [
        None,
        7,
        [],
        [1, 1, 1],
        [1, 1, 1, "text"],
        [3, 1, 1, b"\0\0\0\0\0\0"],
        [True, 1, 1, b"\0\0"],
        [1, 0, 1, b"\0\0"],
        [1, -1, 1, b"\0\0"],
        [1, 2**40, 2**40, b""],
        [1, 2**63, 1, b"\0\0"],
        [1, 3, 1, b"\0\0"],
        [2, 1, 1, b"\0\0\0"],
        [1, 1, 1, b"\0"],
        [1, 1, 1, b""],
        [1, 1, 1, b"\0", 1],
    ],
)
def test_broken_routing_is_refused(field: object) -> None:
    fields = msgpack.unpackb(encode_segment(segment(0, 2, rows(1, 2))))
    with pytest.raises(SchemaError):
        decode_segment(msgpack.packb(fields | {"e": field}))


@given(
    st.one_of(
        st.none(),
        st.binary(max_size=9),
        st.lists(st.one_of(st.integers(0, 2**64 - 1), st.binary(max_size=9)), max_size=5),
        st.dictionaries(st.text(max_size=2), st.integers(0, 3), max_size=4),
    )
)
def test_anything_else_is_a_schema_error_or_rows(field: object) -> None:
    fields = msgpack.unpackb(encode_segment(segment(0, 2, None)))
    try:
        back = decode_segment(msgpack.packb(fields | {"e": field}))
    except SchemaError:
        return
    assert back.routed_experts is not None
    assert np.array_equal(unpack_rows(field), back.routed_experts)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (segment(3, 2, rows(1, 2, 3)), "context rows in the first segment only"),
        (segment(3, 2, rows(1)), "2 tokens at 3 holds 1 rows"),
        (segment(0, 2, np.zeros((2, 1), np.uint8)), r"\[R, L, K\]"),
        (segment(0, 2, np.zeros((2, 1, 1), np.uint32)), "uint32"),
        (segment(0, 2, np.zeros((2, 0, 1), np.uint8)), r"\[2, 0, 1\]"),
        (
            Segment(
                "environment", 0, 1, np.zeros(2, np.int32), np.zeros(0, np.float32), rows(1, 2)
            ),
            "environment segment holds routed experts",
        ),
    ],
)
def test_rows_that_cannot_be_the_segments_are_not_written(broken: Segment, words: str) -> None:
    with pytest.raises(SchemaError, match=words):
        encode_segment(broken)


def test_segments_of_two_workers_join_row_by_row() -> None:
    flat = join_segments(
        [
            segment(0, 2, rows(10, 11, 12, 13)),  # a prompt of three tokens: two context rows
            segment(2, 1, rows(14)),
            segment(3, 2, rows(15, 16), version=4),
        ]
    )
    assert values(flat.routed_experts) == [10, 11, 12, 13, 14, 15, 16]


def test_segments_without_rows_and_of_the_environment_are_unknown() -> None:
    environment = Segment("environment", 2, 1, np.zeros(2, np.int32), np.zeros(0, np.float32))
    flat = join_segments(
        [segment(0, 2, None), environment, segment(4, 1, rows(7)), segment(5, 1, None)]
    )
    assert values(flat.routed_experts) == [255, 255, 255, 255, 7, 255]
    assert flat.routed_experts is not None
    assert known_rows(flat.routed_experts).tolist() == [False] * 4 + [True, False]
    assert join_segments([segment(0, 2, None), segment(2, 1, None)]).routed_experts is None


def test_segments_of_different_models_do_not_join() -> None:
    wide = np.zeros((1, 2, 1), np.uint8)
    for other in (wide, rows(1, dtype=np.uint16)):
        with pytest.raises(SchemaError, match="routed experts change from uint8 of 1 layers"):
            join_segments([segment(0, 1, rows(1)), segment(1, 1, other)])


def test_only_the_first_part_keeps_rows_of_the_context() -> None:
    joined = join_rows([(1, rows(1, 2)), (1, rows(3, 4)), (2, rows(5))])
    assert values(joined) == [1, 2, 4, 255, 5]
    assert values(last_rows(rows(1, 2, 3), 2)) == [2, 3]
    assert values(last_rows(rows(1, 2), 2)) == [1, 2]
    assert values(last_rows(rows(1), 3)) == [255, 255, 1]
    assert values(last_rows(rows(1), 0)) == []


def test_unknown_is_the_largest_value_of_the_type() -> None:
    assert rows_dtype(255) == np.uint8
    assert rows_dtype(256) == np.uint16
    assert signed_rows(rows(0, 254, 255)).ravel().tolist() == [0, 254, -1]
    assert signed_rows(rows(255, 65535, dtype=np.uint16)).ravel().tolist() == [255, -1]
