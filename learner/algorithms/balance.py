"""Which sequences go into which micro-batch of which rank. Pure; shapes are plain integers."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

EVEN_TOKENS = 12_000
"""The length at which attention costs as much as the matrices: parameters of a layer's matrices
over heads x head_dim, which is 11,500 for 300M parameters (hidden 1024) and 11,000 to 15,000 for
dense models up to 10B."""


def cost(length: int, even_tokens: int = EVEN_TOKENS) -> float:
    """Work of one sequence, in tokens: matrices once a token, causal attention by its square."""
    return length * (1.0 + length / even_tokens)


def plan(
    lengths: Sequence[int],
    ranks: int,
    limit_tokens: int,
    even_tokens: int = EVEN_TOKENS,
    *,
    padded: bool = False,
) -> list[list[list[int]]]:
    """Indices of ``lengths`` by rank and micro-batch, equally many micro-batches for each rank.

    Every index is there once. A micro-batch holds ``limit_tokens`` at most, or one longer sequence
    alone. Ranks get their sequences by LPT (the costliest sequence left goes to the rank with the
    least work), so the busiest one has at most 4/3 of what the best split would give it. Each rank
    packs its own first-fit, longest first; ``padded``: neighbours by length are put together, and
    ``limit_tokens`` counts rows x longest. As collectives of sharded engines need the same number
    of forwards everywhere, ranks with fewer micro-batches split theirs; where a rank has fewer
    sequences than others have micro-batches, empty ones stand at its end. The same arguments give
    the same plan, whichever rank asks.

    Raises: ``ValueError`` for fewer than one rank, limit or length.
    """
    if ranks < 1 or limit_tokens < 1 or any(length < 1 for length in lengths):
        raise ValueError("ranks, limit_tokens and every length must be at least 1")
    shares: list[list[int]] = [[] for _ in range(ranks)]
    work = [(0.0, rank) for rank in range(ranks)]
    for index in sorted(range(len(lengths)), key=lambda one: (-lengths[one], one)):
        done, rank = heapq.heappop(work)
        shares[rank].append(index)
        heapq.heappush(work, (done + cost(lengths[index], even_tokens), rank))
    pack = _rows if padded else _first_fit
    packed = [pack(share, lengths, limit_tokens) for share in shares]
    count = max(len(bins) for bins in packed)
    for bins in packed:
        _split_to(bins, count, lengths)
    return packed


def _first_fit(share: Sequence[int], lengths: Sequence[int], limit_tokens: int) -> list[list[int]]:
    """``share`` comes longest first and so do the sequences of each micro-batch."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in share:
        fits = (one for one, left in enumerate(room) if left >= lengths[index])
        place = next(fits, None)
        if place is None:
            bins.append([index])
            room.append(limit_tokens - lengths[index])
        else:
            bins[place].append(index)
            room[place] -= lengths[index]
    return bins


def _rows(share: Sequence[int], lengths: Sequence[int], limit_tokens: int) -> list[list[int]]:
    """``share`` comes longest first: the first row of a micro-batch says how long all are."""
    bins: list[list[int]] = []
    for index in share:
        if bins and (len(bins[-1]) + 1) * lengths[bins[-1][0]] <= limit_tokens:
            bins[-1].append(index)
        else:
            bins.append([index])
    return bins


def _split_to(bins: list[list[int]], count: int, lengths: Sequence[int]) -> None:
    while len(bins) < count:
        largest = max(
            (one for one in bins if len(one) > 1),
            key=lambda one: sum(lengths[index] for index in one),
            default=None,
        )
        if largest is None:
            bins.append([])
            continue
        bins.append(largest[1::2])
        largest[:] = largest[::2]
