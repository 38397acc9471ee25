"""Routed experts out of EngineCore's answers, as ``ringasync.records.routing`` wants them.

vLLM records a row for each position that it reads. An output with n new tokens holds rows up to the
position before the last of them: n rows, and at a request's first output those of the context in
front (from ``routed_experts_prompt_start`` on). 0.26 looks the context up in a buffer by KV slot,
0.32 by block hash: both find what the prefix cache spared. A slot that was never written is zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ringasync.errors import EngineError
from ringasync.records.routing import RoutedRows, last_rows, rows_dtype, unknown_rows


@dataclass(frozen=True, slots=True)
class RoutedShape:
    """L layers (dense ones counted: vLLM leaves theirs zero), K experts a token of E a layer."""

    layers: int
    experts_per_token: int
    num_experts: int

    def rows(
        self, given: npt.NDArray[np.integer] | None, num_tokens: int, *, first: bool
    ) -> RoutedRows:
        """Rows of one output with ``num_tokens`` > 0 new tokens, copied out of its message.

        ``first``: rows of the context in front stay. What vLLM did not give is unknown. Raises
        ``EngineError`` when it gives rows of another model.
        """
        none = np.zeros((0, self.layers, self.experts_per_token), rows_dtype(self.num_experts))
        if given is None:
            return unknown_rows(num_tokens, none)
        if given.shape[1:] != none.shape[1:]:
            raise EngineError(
                f"vLLM gave routed experts {list(given.shape)}, the model has {self.layers} layers "
                f"and {self.experts_per_token} experts a token"
            )
        rows: RoutedRows = given.astype(none.dtype)  # uint8 has no room for unknown at 256 experts
        if self.experts_per_token > 1:
            rows[~given.any(axis=(1, 2))] = np.iinfo(rows.dtype).max  # one expert twice: no choice
        return rows if first and rows.shape[0] >= num_tokens else last_rows(rows, num_tokens)
