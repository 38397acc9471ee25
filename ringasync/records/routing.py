"""Routed experts: which experts the inference engine ran, and which token a row belongs to.

A row is the choice for one *input* position: experts [L, K], the K experts of each of L layers.
The logits of a token come from the position before it, so **the row of a token is that of the
position before it**, recorded by the engine that sampled the token. With a prompt of P tokens and
a response of T:

::

    input position   0  1 ... P-2 | P-1  P ... P+T-2 | P+T-1
    row              context rows | rows of the tokens | none: sampled, not read
    row of token                  |  0   1 ...  T-1   |

A segment of T tokens has the T rows of its tokens; the first of a rollout also has the rows of the
context before them, so that a training forward over prompt and response is replayed throughout.
Later workers, and the recomputation after a swap, read the context again under other weights: that
choice is not recorded, the one that sampled the tokens is kept.

Rows are ``uint8`` for up to 255 experts a layer, else ``uint16``. The largest value of the type
stands where the choice is not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ringasync.errors import SchemaError

MODEL_TYPES = ("qwen3_moe",)
"""``model_type`` of the models whose routing the learner can replay."""

RoutedRows = npt.NDArray[np.unsignedinteger[Any]]
"""uint8 or uint16 [R, L, K]."""

_MAX_SIDE = 0xFFFF
_WIDTHS: dict[int, str] = {1: "<u1", 2: "<u2"}


def rows_dtype(num_experts: int) -> np.dtype[np.unsignedinteger[Any]]:
    """The type of rows for layers of so many experts."""
    return np.dtype(np.uint8 if num_experts <= 255 else np.uint16)


def unknown_rows(count: int, like: RoutedRows) -> RoutedRows:
    """``count`` rows of unknown choices with the type and shape of ``like``."""
    return np.full((count, *like.shape[1:]), np.iinfo(like.dtype).max, like.dtype)


def known_rows(rows: RoutedRows) -> npt.NDArray[np.bool_]:
    """bool [R]: True where the choice of every layer is known."""
    known: npt.NDArray[np.bool_] = (rows != np.iinfo(rows.dtype).max).all(axis=(1, 2))
    return known


def signed_rows(rows: RoutedRows) -> npt.NDArray[np.int32]:
    """int32, with -1 where the choice is not known."""
    signed = rows.astype(np.int32)
    signed[rows == np.iinfo(rows.dtype).max] = -1
    return signed


def last_rows(rows: RoutedRows, count: int) -> RoutedRows:
    """The last ``count`` rows; what is missing in front of them is unknown."""
    missing = count - rows.shape[0]
    if missing > 0:
        return np.concatenate([unknown_rows(missing, rows), rows])
    return rows[-missing:]


def join_rows(parts: Sequence[tuple[int, RoutedRows | None]]) -> RoutedRows | None:
    """Rows of consecutive parts of a response, each given by its tokens and its rows or None.

    Only the first part's context rows stay. A part without rows is unknown; None when all are.
    Raises ``SchemaError`` when parts differ in layers, experts a token or type.
    """
    model = next((rows for _, rows in parts if rows is not None), None)
    if model is None:
        return None
    joined: list[RoutedRows] = []
    for index, (tokens, rows) in enumerate(parts):
        if rows is None:
            joined.append(unknown_rows(tokens, model))
            continue
        if rows.shape[1:] != model.shape[1:] or rows.dtype != model.dtype:
            raise SchemaError(
                f"routed experts change from {_shape(model)} to {_shape(rows)} in one rollout"
            )
        joined.append(rows if index == 0 and rows.shape[0] > tokens else last_rows(rows, tokens))
    return np.concatenate(joined)


def pack_rows(rows: RoutedRows) -> list[Any]:
    """Bytes of a number, L, K, and the rows as raw little-endian bytes."""
    width = rows.dtype.itemsize
    return [width, *rows.shape[1:], rows.astype(_WIDTHS[width]).tobytes()]


def unpack_rows(fields: Any) -> RoutedRows:
    """Rebuild ``pack_rows``'s data.

    Raises ``ValueError``, ``TypeError`` or ``KeyError`` when it is not whole.
    """
    width, layers, experts, raw = fields
    for value in (width, layers, experts):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_SIDE:
            raise ValueError(f"{value!r} is not a whole number from 1 to {_MAX_SIDE}")
    flat = np.frombuffer(raw, dtype=_WIDTHS[width])
    rows: RoutedRows = flat.reshape(-1, layers, experts).astype(flat.dtype.newbyteorder("="))
    return rows


def check_rows(rows: RoutedRows, tokens: int, start: int) -> None:
    """Raise ``SchemaError`` unless these can be the rows of a policy segment of ``tokens``."""
    if rows.ndim != 3 or 0 in rows.shape[1:] or rows.dtype not in (np.uint8, np.uint16):
        raise SchemaError(
            f"routed experts must be uint8 or uint16 [R, L, K], not {rows.dtype} {list(rows.shape)}"
        )
    if rows.shape[0] < tokens or (start > 0 and rows.shape[0] != tokens):
        raise SchemaError(
            f"segment of {tokens} tokens at {start} holds {rows.shape[0]} rows of routed experts: "
            "one for each token, and context rows in the first segment only"
        )


def _shape(rows: RoutedRows) -> str:
    layers, experts = rows.shape[1:]
    return f"{rows.dtype} of {layers} layers, {experts} experts"
