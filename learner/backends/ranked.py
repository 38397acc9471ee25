"""Several ranks as one ``Backend``: rank 0 tells the others each call before it makes its own.

Calls go as msgpack over ``Ranks.broadcast``. What one rank refuses all refuse (``Ranks.agree``), so
a ``RingError`` leaves the ranks in step. A ``StepMemoryError``, which one rank meets alone, and any
other exception end the process that met it, and the launcher then ends the job.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt
import structlog

from learner.backends.base import Backend, ScoredSequence, StepResult
from learner.backends.ranks import Ranks
from learner.backends.wire import pack_batch, pack_sequences, unpack_batch, unpack_sequences
from learner.batch import TrainBatch
from ringasync.errors import RingError, StepMemoryError

_LEAVE = "leave"


class RankedBackend:
    """``Backend`` of rank 0: its own part of each call, with the other ranks at theirs."""

    def __init__(self, local: Backend, ranks: Ranks) -> None:
        self._local, self._ranks = local, ranks
        self._is_in_step = True

    def _tell(self, call: str, *arguments: Any) -> None:
        self._is_in_step = False
        self._ranks.broadcast(msgpack.packb([call, list(arguments)]))

    def _together(self, call: str, own: Sequence[Any], told: Sequence[Any]) -> Any:
        self._tell(call, *told)
        try:
            result = getattr(self._local, call)(*own)
        except RingError as error:
            self._is_in_step = not isinstance(error, StepMemoryError)
            raise
        self._is_in_step = True
        return result

    def train_batch(self, batch: TrainBatch) -> StepResult:
        """See ``Backend.train_batch``."""
        result: StepResult = self._together("train_batch", [batch], [pack_batch(batch)])
        return result

    def logprobs(
        self, sequences: Sequence[ScoredSequence], *, temperature: float
    ) -> list[npt.NDArray[np.float32]]:
        """See ``Backend.logprobs``. Every rank computes all of them: the model is sharded."""
        self._tell("logprobs", pack_sequences(list(sequences)), temperature)
        result = self._local.logprobs(sequences, temperature=temperature)
        self._is_in_step = True
        return result

    def sample(self, num_sequences: int, num_tokens: int, seed: int) -> list[ScoredSequence]:
        """See ``Backend.sample``."""
        arguments = [num_sequences, num_tokens, seed]
        result: list[ScoredSequence] = self._together("sample", arguments, arguments)
        return result

    def begin_save(self, directory: Path) -> Future[None]:
        """See ``Backend.begin_save``: the ranks write their shards and agree in threads."""
        result: Future[None] = self._together("begin_save", [directory], [str(directory)])
        return result

    def load(self, directory: Path) -> None:
        """See ``Backend.load``."""
        self._together("load", [directory], [str(directory)])

    def offload(self) -> None:
        """See ``Backend.offload``."""
        self._together("offload", [], [])

    def onload(self) -> None:
        """See ``Backend.onload``."""
        self._together("onload", [], [])

    def save_hf(self, directory: Path) -> None:
        """See ``Backend.save_hf``."""
        self._together("save_hf", [directory], [str(directory)])

    def begin_export(self, directory: Path) -> Future[None]:
        """See ``Backend.begin_export``: the other ranks send their shards in threads."""
        result: Future[None] = self._together("begin_export", [directory], [str(directory)])
        return result

    def close(self) -> None:
        """Let the other ranks leave; not where a call broke off, for they are within it then."""
        if self._is_in_step:
            self._tell(_LEAVE)


def serve(local: Backend, ranks: Ranks) -> None:
    """A rank other than 0: make the calls that rank 0 makes, until it leaves.

    Consumes: calls of rank 0; produces: this rank's part in them. Waits for: the next call; a call
    or the end of rank 0 unblocks it.
    """
    log = structlog.get_logger(__name__)
    writing: list[Future[None]] = []
    while True:
        call, arguments = msgpack.unpackb(ranks.broadcast(None))
        if call == _LEAVE:
            wait(writing)  # shards must be on disk, or sent; rank 0 tells what went wrong
            # Rank 0 goes first: a rank that went before it would count as lost.
            with contextlib.suppress(RuntimeError):
                ranks.broadcast(None)
            return
        try:
            begun = make_call(local, call, arguments)
            writing = [one for one in (*writing, begun) if one is not None and not one.done()]
        except StepMemoryError:
            raise
        except RingError as error:
            log.warning("refused by all ranks", call=call, error=str(error))


def make_call(local: Backend, call: str, arguments: list[Any]) -> Future[None] | None:
    """Make on this rank what rank 0 told; the future of what a thread goes on with."""
    match call:
        case "train_batch":
            local.train_batch(unpack_batch(arguments[0]))
        case "logprobs":
            local.logprobs(unpack_sequences(arguments[0]), temperature=arguments[1])
        case "sample":
            local.sample(*arguments)
        case "begin_save":
            return local.begin_save(Path(arguments[0]))
        case "begin_export":
            return local.begin_export(Path(arguments[0]))
        case "load":
            local.load(Path(arguments[0]))
        case "save_hf":
            local.save_hf(Path(arguments[0]))
        case "offload":
            local.offload()
        case "onload":
            local.onload()
        case _:
            raise AssertionError(f"unknown call {call!r}")
    return None
