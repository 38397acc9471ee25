"""What the ranks of one learner say to each other beside the tensors of the model.

All of it goes over a gloo group, through main memory, as bytes or float64: nothing is pickled.
A rank that died is not found out here but by the launcher (``learner.launch``), which ends the job.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from learner.algorithms.metrics import TokenStats, concatenate
from learner.backends.collate import MicroBatch
from ringasync import errors


class Ranks:
    """The ranks of a group; one process alone where there is no group: then nothing is sent.

    Every method but ``share`` is a collective: all ranks call it, in the same order.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        """``group`` must be able to work on CPU tensors."""
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def broadcast(self, payload: bytes | None) -> bytes:
        """Rank 0's ``payload`` on every rank; the others wait for it as long as it takes."""
        if self._group is None:
            return payload or b""
        length = torch.tensor([len(payload or b"")])
        dist.broadcast(length, 0, self._group)
        buffer = torch.empty(int(length), dtype=torch.uint8)
        if payload:
            buffer = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        dist.broadcast(buffer, 0, self._group)
        return buffer.numpy().tobytes()

    def gather(self, payload: bytes) -> list[bytes]:
        """Every rank's ``payload``, by rank, on every rank."""
        if self._group is None:
            return [payload]
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(payload)]), self._group)
        widest = max(int(one) for one in lengths)
        own = torch.zeros(widest, dtype=torch.uint8)
        own[: len(payload)] = torch.frombuffer(bytearray(payload or b"\0"), dtype=torch.uint8)[
            : len(payload)
        ]
        parts = [torch.zeros(widest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(parts, own, self._group)
        return [
            part.numpy().tobytes()[: int(length)]
            for part, length in zip(parts, lengths, strict=True)
        ]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over the ranks, place by place, in float64 and the same bits on each."""
        if self._group is None:
            return list(values)
        total = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(total, group=self._group)
        return [float(one) for one in total]

    def agree(self, problem: errors.RingError | None) -> None:
        """Raise on every rank what the first rank with a ``problem`` has; nothing if none has."""
        if self._group is None:
            if problem is not None:
                raise problem
            return
        said = [type(problem).__name__, str(problem)] if problem is not None else []
        gathered = [msgpack.unpackb(one) for one in self.gather(msgpack.packb(said))]
        for rank, one in enumerate(gathered):
            if one:
                kind = getattr(errors, one[0], errors.TrainingError)
                raise kind(one[1] if rank == self.rank else f"{one[1]} (learner rank {rank})")

    def join_stats(self, stats: TokenStats) -> TokenStats:
        """The stats of all ranks' tokens, rank by rank."""
        if self._group is None:
            return stats
        columns = (stats.log_ratio, stats.weights, stats.ages, stats.clipped, stats.entropy)
        parts = []
        for payload in self.gather(msgpack.packb([one.tobytes() for one in columns])):
            kinds = (np.float64, np.float64, np.int64, np.bool_, np.float64)
            arrays: list[Any] = [
                np.frombuffer(raw, kind)
                for raw, kind in zip(msgpack.unpackb(payload), kinds, strict=True)
            ]
            parts.append(TokenStats(*arrays))
        return concatenate(parts)

    def share(self, micro_batches: Sequence[MicroBatch]) -> tuple[list[MicroBatch], list[bool]]:
        """This rank's micro-batches, as many as every other rank's, and which of them count.

        They are dealt out in turn, as ``collate`` has planned it for so many ranks. Sharded weights
        are gathered in every forward, so a rank that has fewer was given fillers, whose gradient is
        zero.
        """
        starts = range(0, len(micro_batches), self.size)
        rounds = [micro_batches[start : start + self.size] for start in starts]
        own = [
            replace(together[self.rank], widest=max(len(one.targets) for one in together))
            for together in rounds
        ]
        return own, [not one.is_filler for one in own]
