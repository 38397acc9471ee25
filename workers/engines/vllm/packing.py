"""The log-probs of a step as one array, not three small arrays for every request.

vLLM's scheduler cuts a step's log-probs into a ``LogprobsLists`` a request, and EngineCore writes
each array of each of them into its message by a call back into Python, which the front end undoes
likewise. ``install`` (in EngineCore) lets the whole step travel with its first output;
``StepLogprobs`` (in the front end) reads both forms.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

PACK_VARIABLE = "RINGASYNC_PACK_LOGPROBS"
"""Set for the processes of engines that are read by ``StepLogprobs``."""


class StepRows:
    """Stands for a step's ``LogprobsLists`` in the scheduler; a slice is a list of floats."""

    def __init__(self, step: Any) -> None:
        # [rows, 1 + top]: the first column is the sampled token's.
        self._values: list[float] = step.logprobs[:, 0].tolist()
        self._starts: Sequence[int] | None = step.cu_num_generated_tokens

    def slice_request(self, index: int, count: int) -> list[float]:
        """As ``LogprobsLists.slice_request``: ``count`` rows of the request at ``index``."""
        start = index if self._starts is None else self._starts[index]
        return self._values[start : start + count]


def pack(outputs: Sequence[Any], make_lists: Any) -> None:
    """Move the ``StepRows`` slices of one message's outputs to the first of them.

    ``make_lists`` is vLLM's ``LogprobsLists``; its last field, unused in messages, holds the number
    of rows of every output, which also tells that the step is packed.
    """
    values: list[float] = []
    counts: list[int] = []
    for output in outputs:
        rows = output.new_logprobs
        counts.append(0 if rows is None else len(rows))
        if rows is not None:
            values += rows
            output.new_logprobs = None
    if values:
        none = np.zeros(0, np.int32)
        column = np.array(values, np.float32)[:, None]
        outputs[0].new_logprobs = make_lists(none, column, none, counts)


@contextmanager
def asked_for(wanted: bool) -> Iterator[None]:
    """Processes started meanwhile pack, or do not; those of other engines are not meant."""
    if wanted:
        os.environ[PACK_VARIABLE] = "1"
    try:
        yield
    finally:
        os.environ.pop(PACK_VARIABLE, None)


def install() -> None:
    """Make this process's scheduler pack, where ``PACK_VARIABLE`` asks for it; once is enough."""
    if os.environ.get(PACK_VARIABLE) != "1":
        return
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.outputs import LogprobsLists

    plain = Scheduler.update_from_output
    if hasattr(plain, "__wrapped__"):
        return

    @functools.wraps(plain)
    def update_from_output(self: Any, scheduler_output: Any, runner_output: Any) -> Any:
        if runner_output.logprobs is None:
            return plain(self, scheduler_output, runner_output)
        runner_output.logprobs = StepRows(runner_output.logprobs)
        messages = plain(self, scheduler_output, runner_output)
        for message in messages.values():
            pack(message.outputs, LogprobsLists)
        return messages

    Scheduler.update_from_output = update_from_output


class StepLogprobs:
    """Reads the log-probs of outputs in the order in which they came, packed or not.

    A step may be handed over in several pieces, so the place is kept between calls.
    """

    def __init__(self) -> None:
        self._values: list[float] = []
        self._counts: list[int] = []
        self._output = self._row = 0

    def of(self, output: Any) -> list[float]:
        """Log-probs of one output's tokens; must be asked for each output, wanted or not."""
        lists = output.new_logprobs
        if lists is not None and lists.cu_num_generated_tokens is None:
            return self._column(lists.logprobs)
        if lists is not None:
            self._values, self._counts = self._column(lists.logprobs), lists.cu_num_generated_tokens
            self._output = self._row = 0
        if self._output >= len(self._counts):
            return []
        start = self._row
        self._row += self._counts[self._output]
        self._output += 1
        return self._values[start : self._row]

    @staticmethod
    def _column(logprobs: npt.NDArray[np.float32]) -> list[float]:
        values: list[float] = logprobs[:, 0].tolist()
        return values
