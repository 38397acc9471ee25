"""Packed log-probs: what a scheduler packs, the sink's reader gives back, whatever the pieces."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from workers.engines.vllm.packing import (
    PACK_VARIABLE,
    StepLogprobs,
    StepRows,
    asked_for,
    pack,
)


class Lists(NamedTuple):
    """As vLLM's ``LogprobsLists``."""

    logprob_token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    sampled_token_ranks: npt.NDArray[np.int32]
    cu_num_generated_tokens: list[int] | None = None


class Step(NamedTuple):
    """Rows of each request in the batch, and which of them have an output, in which order."""

    rows: list[list[float]]
    order: list[int]
    cut: int
    """Outputs handed over in a first piece."""


FLOATS = st.floats(-100, 0, width=32)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    rows = draw(st.lists(st.lists(FLOATS, min_size=0, max_size=3), min_size=1, max_size=6))
    order = draw(st.permutations(range(len(rows))))
    kept = draw(st.integers(0, len(rows)))
    return Step(rows, list(order)[:kept], draw(st.integers(0, len(rows))))


def runner_lists(step: Step, speculative: bool) -> Lists:
    """What the model runner gives: all rows below each other, with the starts if they vary."""
    flat = np.array([x for rows in step.rows for x in rows], np.float32).reshape(-1, 1)
    flat = np.concatenate([flat, np.full_like(flat, -77.0)], axis=1)  # a second column: top-1
    starts = [0, *np.cumsum([len(rows) for rows in step.rows]).tolist()]
    none = np.zeros(0, np.int32)
    return Lists(none, flat, none, starts if speculative else None)


@given(st.lists(steps(), max_size=4))
def test_what_is_packed_comes_back(played: list[Step]) -> None:
    reader = StepLogprobs()
    for step in played:
        rows = StepRows(runner_lists(step, speculative=True))
        outputs: list[Any] = [
            SimpleNamespace(new_logprobs=rows.slice_request(i, len(step.rows[i])))
            for i in step.order
        ]
        pack(outputs, Lists)
        carrying = [output for output in outputs if output.new_logprobs is not None]
        assert len(carrying) <= 1
        pieces = outputs[: step.cut], outputs[step.cut :]
        read = [reader.of(output) for piece in pieces for output in piece]
        assert read == [step.rows[i] for i in step.order]


def test_one_row_a_request_needs_no_starts() -> None:
    step = Step([[-1.0], [-2.0], [-3.0]], [], 0)
    rows = StepRows(runner_lists(step, speculative=False))
    assert rows.slice_request(1, 1) == [-2.0]


def test_requests_without_logprobs_count_as_no_rows() -> None:
    outputs: list[Any] = [
        SimpleNamespace(new_logprobs=None),
        SimpleNamespace(new_logprobs=[-1.5]),
        SimpleNamespace(new_logprobs=None),
        SimpleNamespace(new_logprobs=[-2.5]),
    ]
    pack(outputs, Lists)
    assert outputs[0].new_logprobs.cu_num_generated_tokens == [0, 1, 0, 1]
    reader = StepLogprobs()
    assert [reader.of(output) for output in outputs] == [[], [-1.5], [], [-2.5]]


def test_plain_outputs_are_read_too() -> None:
    none = np.zeros(0, np.int32)
    plain: Any = SimpleNamespace(new_logprobs=Lists(none, np.array([[-1.0]], np.float32), none))
    reader = StepLogprobs()
    assert reader.of(plain) == [-1.0]
    assert reader.of(SimpleNamespace(new_logprobs=None)) == []


def test_only_processes_started_meanwhile_are_asked() -> None:
    with asked_for(False):
        assert PACK_VARIABLE not in os.environ
    with asked_for(True):
        assert os.environ[PACK_VARIABLE] == "1"
    assert PACK_VARIABLE not in os.environ
