"""Segments: what a lease appends to a rollout in one go, and their wire form.

A segment is one element of the Redis list ``ring:{run}:seg:ROLLOUT``: a msgpack map with raw
little-endian arrays inside, about 6 bytes a token for vocabularies below 65,536 and 8 above.
Log-probs stay fp32: a half-precision round trip would be exponentiated by the mismatch ratio.
Routed experts (see ``routing``) come on top only where they were asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgpack
import numpy as np
import numpy.typing as npt

from ringasync import SCHEMA_VERSION
from ringasync.errors import SchemaError
from ringasync.records.routing import RoutedRows, check_rows, pack_rows, unpack_rows

SegmentKind = Literal["policy", "environment"]
_KIND_CODES: dict[SegmentKind, int] = {"policy": 0, "environment": 1}
_KIND_NAMES: dict[int, SegmentKind] = {code: kind for kind, code in _KIND_CODES.items()}
_MAX_SHORT_ID = 0xFFFF
_MAX_WHOLE = 2**31 - 1
"""Offsets and versions are int32 in trajectories."""


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Consecutive tokens of one rollout under one policy version.

    Shapes: ``token_ids`` int32 [T], ``behavior_logprobs`` float32 [T] (``[0]`` for
    ``environment`` segments, which are never trained and not in the ledger).
    ``start`` is the offset of the first token in the response, environment tokens included.
    ``routed_experts``: uint8 or uint16 [R, L, K], R >= T, as ``routing`` says; None: not recorded.
    """

    kind: SegmentKind
    start: int
    policy_version: int
    token_ids: npt.NDArray[np.int32]
    behavior_logprobs: npt.NDArray[np.float32]
    routed_experts: RoutedRows | None = None

    @property
    def num_tokens(self) -> int:
        """Length T of the segment."""
        return int(self.token_ids.shape[0])

    @property
    def end(self) -> int:
        """Offset one past the last token."""
        return self.start + self.num_tokens


def policy_segment(
    start: int,
    policy_version: int,
    token_ids: Sequence[int],
    behavior_logprobs: Sequence[float],
    routed_experts: RoutedRows | None = None,
) -> Segment:
    """Build a ``policy`` segment from plain sequences of equal length."""
    return Segment(
        "policy",
        start,
        policy_version,
        np.asarray(token_ids, dtype=np.int32),
        np.asarray(behavior_logprobs, dtype=np.float32),
        routed_experts,
    )


def encode_segment(segment: Segment) -> bytes:
    """Serialise a segment. Raises ``SchemaError`` when it breaks its own rules."""
    _check(segment)
    short = bool(segment.num_tokens) and int(segment.token_ids.max()) <= _MAX_SHORT_ID
    ids = segment.token_ids.astype("<u2" if short else "<i4")
    fields: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "k": _KIND_CODES[segment.kind],
        "s": segment.start,
        "v": segment.policy_version,
        "n": segment.num_tokens,
        "w": ids.dtype.itemsize,
        "t": ids.tobytes(),
        "l": segment.behavior_logprobs.astype("<f4").tobytes(),
    }
    if segment.routed_experts is not None:
        fields["e"] = pack_rows(segment.routed_experts)
    return bytes(msgpack.packb(fields))


def decode_segment(payload: bytes) -> Segment:
    """Parse one list element. Raises ``SchemaError`` unless it is a whole, sane segment."""
    try:
        fields: Any = msgpack.unpackb(payload, strict_map_key=True)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise SchemaError(f"segment is not msgpack or is cut short: {error}") from error
    if not isinstance(fields, dict) or fields.get("schema") != SCHEMA_VERSION:
        found = fields.get("schema") if isinstance(fields, dict) else type(fields).__name__
        raise SchemaError(f"segment has schema {found!r}, this build reads {SCHEMA_VERSION}")
    try:
        kind = _KIND_NAMES[fields["k"]]
        width = {2: "<u2", 4: "<i4"}[fields["w"]]
        segment = Segment(
            kind,
            _whole(fields, "s"),
            _whole(fields, "v"),
            np.frombuffer(fields["t"], dtype=width).astype(np.int32),
            np.frombuffer(fields["l"], dtype="<f4").astype(np.float32),
            unpack_rows(fields["e"]) if "e" in fields else None,
        )
        declared = _whole(fields, "n")
    except (KeyError, TypeError, ValueError) as error:
        raise SchemaError(f"segment field missing or of the wrong type: {error!r}") from error
    if declared != segment.num_tokens:
        raise SchemaError(f"segment says {declared} tokens and holds {segment.num_tokens}")
    _check(segment)
    return segment


def _whole(fields: dict[str, Any], name: str) -> int:
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_WHOLE:
        raise ValueError(f"{name}={value!r} is not a whole number from 0 to {_MAX_WHOLE}")
    return value


def _check(segment: Segment) -> None:
    if segment.num_tokens == 0:
        raise SchemaError("segment is empty")
    if int(segment.token_ids.min()) < 0:
        raise SchemaError("segment holds a negative token id")
    expected = segment.num_tokens if segment.kind == "policy" else 0
    if segment.behavior_logprobs.shape[0] != expected:
        raise SchemaError(
            f"{segment.kind} segment of {segment.num_tokens} tokens holds "
            f"{segment.behavior_logprobs.shape[0]} log-probs, expected {expected}"
        )
    if not bool(np.isfinite(segment.behavior_logprobs).all()):
        raise SchemaError("segment holds a log-prob that is NaN or infinite")
    if segment.routed_experts is not None:
        if segment.kind != "policy":
            raise SchemaError(f"{segment.kind} segment holds routed experts")
        check_rows(segment.routed_experts, segment.num_tokens, segment.start)
