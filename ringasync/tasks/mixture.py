"""Several domains mixed by weight, a pure function of (seed, index)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from ringasync.config.schema import DataConfig, TaskConfig
from ringasync.tasks.base import Problem, Style, TaskSource, generator
from ringasync.tasks.mathematics import MathematicsSource
from ringasync.tasks.reasoning_gym import ReasoningGymSource
from ringasync.tasks.rows import load_hub, load_jsonl

BLOCK = 1000
"""Shares are exact within every so many prompts; the order inside a block is shuffled."""


class Mixture:
    """Prompts by index, drawn from sources by weight.

    Finite sources are passed through in a new order each epoch, each row once; after ``epochs``
    passes of any of them ``problem`` raises ``IndexError``. ``epochs=None`` goes on for ever.
    """

    def __init__(
        self,
        sources: Sequence[TaskSource],
        weights: Sequence[float],
        seed: int,
        epochs: int | None = None,
    ) -> None:
        if not sources or len(sources) != len(weights):
            raise ValueError("a mixture needs sources and as many weights")
        self._sources = tuple(sources)
        self._seed, self._epochs = seed, epochs
        self._shares = block_shares(weights)
        self._block = lru_cache(maxsize=8)(self._make_block)
        self._order = lru_cache(maxsize=2 * len(sources))(self._make_order)

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the sources."""
        return tuple(source.name for source in self._sources)

    def problem(self, index: int) -> Problem:
        """The prompt at ``index``.

        Raises:
            BadPromptError: the row there is broken; the next index is another row.
            IndexError: the data have ended.
        """
        source, position = self._locate(index)
        found = source.problem(position)
        return Problem(found.prompt, found.domain, found.task, found.source, index)

    def solution(self, index: int, style: Style) -> str | None:
        """A correct response to ``problem(index)`` in this style, where the source knows one."""
        source, position = self._locate(index)
        return source.solution(position, style)

    def _locate(self, index: int) -> tuple[TaskSource, int]:
        if index < 0:
            raise IndexError(index)
        block, offset = divmod(index, BLOCK)
        kinds, ranks = self._block(block)
        kind = kinds[offset]
        position = block * self._shares[kind] + ranks[offset]
        source = self._sources[kind]
        if source.size is None:
            return source, position
        epoch, row = divmod(position, source.size)
        if self._epochs is not None and epoch >= self._epochs:
            raise IndexError(f"{source.name} ended after {self._epochs} epochs")
        return source, self._order(kind, epoch)[row]

    def _make_block(self, block: int) -> tuple[list[int], list[int]]:
        """Which source each place of a block has, and the how-manieth of that source it is."""
        kinds = [kind for kind, share in enumerate(self._shares) for _ in range(share)]
        generator(self._seed, "block", block).shuffle(kinds)
        seen = [0] * len(self._shares)
        ranks = []
        for kind in kinds:
            ranks.append(seen[kind])
            seen[kind] += 1
        return kinds, ranks

    def _make_order(self, kind: int, epoch: int) -> list[int]:
        order = list(range(self._sources[kind].size or 0))
        generator(self._seed, self._sources[kind].name, "epoch", epoch).shuffle(order)
        return order


def block_shares(weights: Sequence[float]) -> list[int]:
    """Places in a block for each weight: largest remainders, at least one, ``BLOCK`` in all."""
    exact = [weight / sum(weights) * BLOCK for weight in weights]
    shares = [max(1, int(value)) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: exact[i] - int(exact[i]), reverse=True)
    for i in range(max(0, BLOCK - sum(shares))):
        shares[by_remainder[i % len(shares)]] += 1
    while sum(shares) > BLOCK:
        shares[shares.index(max(shares))] -= 1
    return shares


def build_mixture(data: DataConfig, seed: int) -> Mixture:
    """The mixture that a configuration describes.

    Raises:
        ConfigError: a source cannot be had; names the task and the remedy.
    """
    sources = [_build_source(task, seed) for task in data.tasks]
    return Mixture(sources, [task.weight for task in data.tasks], seed, data.epochs)


def _build_source(task: TaskConfig, seed: int) -> TaskSource:
    if task.kind == "reasoning_gym":
        return ReasoningGymSource(task, seed)
    if task.kind == "mathematics":
        return MathematicsSource(task, seed)
    return load_jsonl(task) if task.kind == "jsonl" else load_hub(task)
