"""From leases to local rollouts: what can be generated, what is done already, what is poison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ringasync.broker.types import Lease, Poll
from ringasync.clock import monotonic_s
from ringasync.errors import SchemaError
from ringasync.records.segment import decode_segment
from ringasync.records.states import FinishReason
from workers.buffers import LocalRollout, local_rollout

_EMPTY_TAKE_PAUSE_S = (0.05, 0.2)
"""First and longest. Short rollouts take about a second: a longer pause would idle the engine."""


class TakePause:
    """How long to leave the queue alone after takes that came back empty.

    The pause doubles, so that idle workers do not keep Redis busy. It begins anew when leases come
    and when something changes that decides which tickets this worker may have.
    """

    def __init__(self, clock: Callable[[], float] = monotonic_s) -> None:
        self._clock = clock
        self._seen: tuple[object, ...] = ()
        self._pause_s = _EMPTY_TAKE_PAUSE_S[0]
        self._until_s = 0.0

    def is_over(self, poll: Poll, loaded_version: int) -> bool:
        """Whether to try now."""
        seen = (
            loaded_version,
            poll.incarnation,
            poll.round_id,
            poll.round_state,
            poll.pin_version,
            poll.paused,
        )
        if seen != self._seen:
            self._seen = seen
            self._reset()
        return self._clock() >= self._until_s

    def note(self, num_leases: int) -> None:
        """A take brought so many."""
        if num_leases:
            self._reset()
            return
        self._until_s = self._clock() + self._pause_s
        self._pause_s = min(2 * self._pause_s, _EMPTY_TAKE_PAUSE_S[1])

    def _reset(self) -> None:
        self._pause_s, self._until_s = _EMPTY_TAKE_PAUSE_S[0], 0.0


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What bounds a rollout: the window in tokens, EOS ids, and the vocabulary (0: unknown)."""

    window_tokens: int
    eos_token_ids: tuple[int, ...]
    vocab_size: int = 0


@dataclass(slots=True)
class Intake:
    """Leases sorted: ``generate`` for the engine, ``done`` complete, ``bad`` with a reason."""

    generate: list[LocalRollout] = field(default_factory=list)
    done: list[LocalRollout] = field(default_factory=list)
    bad: list[tuple[Lease, str]] = field(default_factory=list)


def sort_leases(leases: Sequence[Lease], limits: ModelLimits) -> Intake:
    """Decode the prefixes and decide what becomes of each lease."""
    intake = Intake()
    for lease in leases:
        problem = lease.unreadable or prompt_problem(lease.prompt_ids, limits)
        if problem:
            intake.bad.append((lease, problem))
            continue
        try:
            rollout = local_rollout(lease, [decode_segment(raw) for raw in lease.segments])
        except SchemaError as error:
            intake.bad.append((lease, f"its record cannot be read: {error}"))
            continue
        rollout.finish = ended_already(rollout, limits)
        (intake.generate if rollout.finish is None else intake.done).append(rollout)
    return intake


def prompt_problem(prompt_ids: Sequence[int], limits: ModelLimits) -> str:
    """Why a prompt cannot be generated on; empty when it can."""
    if not prompt_ids:
        return "the prompt is empty"
    if len(prompt_ids) >= limits.window_tokens:
        return (
            f"the prompt has {len(prompt_ids)} tokens and leaves no room in the model's window of "
            f"{limits.window_tokens}"
        )
    if min(prompt_ids) < 0 or (limits.vocab_size and max(prompt_ids) >= limits.vocab_size):
        return f"the prompt holds token ids outside the vocabulary of {limits.vocab_size}"
    return ""


def ended_already(rollout: LocalRollout, limits: ModelLimits) -> FinishReason | None:
    """Whether what Redis holds is a whole response: its worker died between append and finish."""
    if rollout.prefix_ids and rollout.prefix_ids[-1] in limits.eos_token_ids:
        return FinishReason.STOP
    if rollout.remaining_tokens(limits.window_tokens) <= 0:
        return FinishReason.LENGTH
    return None
