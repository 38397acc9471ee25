"""C3PO selection: which trajectories, and how much of the last one, make exactly Phi tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ringasync.errors import InvariantError


@dataclass(frozen=True, slots=True)
class Candidate:
    """A trajectory that may be selected; ``num_tokens`` counts its policy tokens."""

    rollout_id: str
    group_id: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Selected:
    """A trajectory of the batch: its first ``trained_tokens`` policy tokens train.

    ``masked_tokens`` is the tail that the budget cut; only the last one may have any.
    """

    rollout_id: str
    group_id: str
    trained_tokens: int
    masked_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Selection:
    """The batch in training order, and what is carried to the next batch, in its order."""

    order: tuple[Selected, ...]
    surplus: tuple[str, ...]

    @property
    def trained_tokens(self) -> int:
        """Policy tokens that train: Phi, or all there are when there are fewer."""
        return sum(one.trained_tokens for one in self.order)

    @property
    def masked_tokens(self) -> int:
        """Policy tokens cut by the budget."""
        return sum(one.masked_tokens for one in self.order)


def select(
    carried: Sequence[Candidate],
    groups: Sequence[Sequence[Candidate]],
    *,
    budget_tokens: int,
    seed: int,
) -> Selection:
    """Choose trajectories until exactly ``budget_tokens`` policy tokens are reached.

    ``carried`` come first, in their order. Then whole groups, in a shuffle drawn from ``seed`` (in
    arrival or length order the budget would always cut the same kind), members shuffled too, until
    the sum reaches the budget. The trajectory that crosses it loses its tail; those behind it are
    surplus. The order in which groups and members are given does not matter. A trajectory without
    policy tokens is settled at once and never carried, unless its whole group was not reached.

    Raises: ``ValueError`` for a budget below 1 or a rollout given twice.
    Source: Ring-lite (C3PO) eq. 2 and 3, figure 3.
    """
    if budget_tokens < 1:
        raise ValueError(f"budget_tokens must be at least 1, got {budget_tokens}")
    queue = [*carried, *_shuffled(groups, seed)]
    if len({one.rollout_id for one in queue}) != len(queue):
        raise ValueError("a rollout was given twice to the selection")
    order: list[Selected] = []
    surplus: list[str] = []
    room = budget_tokens
    touched: set[str] = set()
    for one in queue:
        if room > 0:
            trained = min(one.num_tokens, room)
            masked = one.num_tokens - trained
            order.append(Selected(one.rollout_id, one.group_id, trained, masked))
            touched.add(one.group_id)
            room -= trained
        elif one.num_tokens == 0 and one.group_id in touched:
            order.append(Selected(one.rollout_id, one.group_id, 0))
        else:
            surplus.append(one.rollout_id)
    selection = Selection(tuple(order), tuple(surplus))
    _check(selection, queue, budget_tokens)
    return selection


def _shuffled(groups: Sequence[Sequence[Candidate]], seed: int) -> list[Candidate]:
    """Members of all groups, groups kept together, both levels shuffled from ``seed`` alone."""
    generator = np.random.default_rng(seed)
    canonical = sorted(
        (sorted(group, key=lambda one: one.rollout_id) for group in groups if group),
        key=lambda group: group[0].group_id,
    )
    result: list[Candidate] = []
    for index in generator.permutation(len(canonical)):
        group = canonical[int(index)]
        result.extend(group[int(member)] for member in generator.permutation(len(group)))
    return result


def _check(selection: Selection, queue: Sequence[Candidate], budget_tokens: int) -> None:
    available = sum(one.num_tokens for one in queue)
    if selection.trained_tokens != min(budget_tokens, available):
        raise InvariantError(
            f"selection trains {selection.trained_tokens} of {available} tokens, "
            f"the budget is {budget_tokens}"
        )
