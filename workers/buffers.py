"""What a worker holds of each leased rollout: tokens not yet in Redis. Pure data, no I/O.

::

    lease ── accepted in Redis ──┬── outstanding segment ──┬── runs of one version ──┬── held ──
                                 │ sent, no answer yet     │ to be cut into segments │ version on
                                 └ repeated as it is       └                         └ trial: kept
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from ringasync.broker.types import AppendItem, Lease
from ringasync.clock import monotonic_s
from ringasync.observability.log import get_logger
from ringasync.records.routing import RoutedRows, join_rows, last_rows
from ringasync.records.segment import Segment, encode_segment, policy_segment
from ringasync.records.states import FinishReason
from ringasync.records.trajectory import join_segments
from workers.engines.base import GenerationRequest, TokenChunk

log = get_logger()


@dataclass(slots=True)
class _Run:
    """Consecutive tokens under one version, not yet sent."""

    policy_version: int
    token_ids: list[int]
    behavior_logprobs: list[float]
    routed: list[tuple[int, RoutedRows | None]] = field(default_factory=list)
    """Of each chunk: its tokens and their routed experts."""

    def segment(self, start: int) -> Segment:
        """The segment of these tokens. Raises ``SchemaError`` on routing of several shapes."""
        rows = join_rows(self.routed)
        if rows is not None and start > 0:
            rows = last_rows(rows, len(self.token_ids))
        return policy_segment(
            start, self.policy_version, self.token_ids, self.behavior_logprobs, rows
        )


@dataclass(slots=True)
class LocalRollout:
    """One leased rollout and its unsent tokens.

    ``length`` is what Redis is known to hold of the response, in tokens. ``leaving`` is why the
    rollout is to be parked once its tokens are sent; empty while it is generated.
    """

    lease: Lease
    prefix_ids: tuple[int, ...]
    length: int
    runs: deque[_Run] = field(default_factory=deque)
    outstanding: AppendItem | None = None
    finish: FinishReason | None = None
    leaving: str = ""
    oldest_s: float = 0.0

    @property
    def rollout_id(self) -> str:
        """Its id, also the engine's request id."""
        return self.lease.rollout_id

    def add(self, chunk: TokenChunk, now_s: float) -> None:
        """Take what the engine sampled."""
        if chunk.token_ids:
            if not self.runs and self.outstanding is None:
                self.oldest_s = now_s
            if not self.runs or self.runs[-1].policy_version != chunk.policy_version:
                self.runs.append(_Run(chunk.policy_version, [], []))
            self.runs[-1].token_ids.extend(chunk.token_ids)
            self.runs[-1].behavior_logprobs.extend(chunk.behavior_logprobs)
            # Evaluations are never trained, so their rows would only weigh.
            rows = chunk.routed_experts if self.lease.kind == "train" else None
            self.runs[-1].routed.append((len(chunk.token_ids), rows))
        if chunk.finish is not None:
            self.finish = FinishReason(chunk.finish)

    @property
    def unsent_tokens(self) -> int:
        """Tokens that Redis is not known to hold, held ones included."""
        sent = self.outstanding.length if self.outstanding is not None else 0
        return sent + sum(len(run.token_ids) for run in self.runs)

    def sendable_tokens(self, held_version: int | None) -> int:
        """Tokens that may be sent now: all up to those of the version on trial."""
        total = self.outstanding.length if self.outstanding is not None else 0
        for run in self.runs:
            if run.policy_version == held_version:
                break
            total += len(run.token_ids)
        return total

    def held_tokens(self, held_version: int | None) -> int:
        """Tokens of the version on trial."""
        return sum(len(run.token_ids) for run in self.runs if run.policy_version == held_version)

    def cut(self, held_version: int | None) -> AppendItem | None:
        """The next segment to send; the same one again until ``acknowledge`` or ``lost``.

        An answer may be lost on the way, so what was sent once is never cut differently.
        """
        if self.outstanding is None and self.runs:
            run = self.runs[0]
            if run.policy_version != held_version:
                self.runs.popleft()
                self.outstanding = self._item(run.segment(self.length))
        return self.outstanding

    def _item(self, segment: Segment) -> AppendItem:
        return AppendItem(
            rollout_id=self.rollout_id,
            token=self.lease.token,
            start=segment.start,
            length=segment.num_tokens,
            num_tokens=segment.num_tokens,
            policy_version=segment.policy_version,
            payload=encode_segment(segment),
        )

    def acknowledge(self, now_s: float) -> None:
        """Redis has the outstanding segment."""
        if self.outstanding is not None:
            self.length = self.outstanding.start + self.outstanding.length
            self.outstanding = None
            self.oldest_s = now_s

    def drop_version(self, policy_version: int) -> int:
        """Forget unsent tokens of a version that failed; returns how many."""
        dropped = 0
        while self.runs and self.runs[-1].policy_version == policy_version:
            dropped += len(self.runs.pop().token_ids)
            self.finish = None
        return dropped

    @property
    def is_settled(self) -> bool:
        """All sent, and it ended or is to be parked."""
        return not self.unsent_tokens and (self.finish is not None or bool(self.leaving))

    def request(self, window_tokens: int) -> GenerationRequest:
        """What the engine is asked for; ``window_tokens`` bounds prompt and response together."""
        return GenerationRequest(
            request_id=self.rollout_id,
            prompt_ids=self.lease.prompt_ids,
            prefix_ids=self.prefix_ids,
            max_new_tokens=self.remaining_tokens(window_tokens),
            seed=self.lease.seed,
        )

    def remaining_tokens(self, window_tokens: int) -> int:
        """Tokens still to sample; 0 or less when it is as long as it may be."""
        limit = min(self.lease.max_new_tokens, window_tokens - len(self.lease.prompt_ids))
        return limit - len(self.prefix_ids)


class RolloutStore:
    """All rollouts a worker holds leases on, by id."""

    def __init__(self, clock: Callable[[], float] = monotonic_s) -> None:
        self._rollouts: dict[str, LocalRollout] = {}
        self._clock = clock
        self.held_version: int | None = None
        """The version on trial: its tokens are not sent before its canary passed."""

    def __len__(self) -> int:
        return len(self._rollouts)

    def __iter__(self) -> Iterator[LocalRollout]:
        return iter(list(self._rollouts.values()))

    def __contains__(self, rollout_id: str) -> bool:
        return rollout_id in self._rollouts

    def put(self, rollout: LocalRollout) -> None:
        """Begin to hold a rollout."""
        self._rollouts[rollout.rollout_id] = rollout

    def holds(self, rollout: LocalRollout) -> bool:
        """Whether this very one is held, and not another lease of the same rollout."""
        return self._rollouts.get(rollout.rollout_id) is rollout

    def remove(self, rollout_id: str) -> None:
        """Forget a rollout and its unsent tokens."""
        self._rollouts.pop(rollout_id, None)

    def drop_superseded(self, leases: Sequence[Lease]) -> list[str]:
        """Forget those that are leased anew while they are held; returns their ids.

        Redis lost its tail, and with it the older lease, before anybody noticed.
        """
        dropped = [each.rollout_id for each in leases if each.rollout_id in self._rollouts]
        for rollout_id in dropped:
            log.warning("lease superseded: Redis forgot the older one", rollout=rollout_id)
            self.remove(rollout_id)
        return dropped

    def absorb(self, chunks: Sequence[TokenChunk]) -> int:
        """Sort the engine's tokens into their rollouts; returns how many were taken.

        Tokens of rollouts that are not held any more are dropped.
        """
        now_s, taken = self._clock(), 0
        for chunk in chunks:
            rollout = self._rollouts.get(chunk.request_id)
            if rollout is not None and not rollout.leaving:
                rollout.add(chunk, now_s)
                taken += len(chunk.token_ids)
        return taken

    def due(self, flush_tokens: int, flush_s: float) -> list[LocalRollout]:
        """Rollouts to send now: enough tokens, old enough tokens, ended or to be parked."""
        now_s = self._clock()
        return [rollout for rollout in self if self._is_due(rollout, flush_tokens, flush_s, now_s)]

    def _is_due(
        self, rollout: LocalRollout, flush_tokens: int, flush_s: float, now_s: float
    ) -> bool:
        sendable = rollout.sendable_tokens(self.held_version)
        if not sendable:
            return rollout.is_settled
        ended = rollout.finish is not None or bool(rollout.leaving)
        changed = len(rollout.runs) > 1 or rollout.outstanding is not None
        aged = now_s - rollout.oldest_s >= flush_s
        return ended or changed or aged or sendable >= flush_tokens

    def most_unsent_tokens(self) -> int:
        """Sendable tokens of the rollout that has most of them."""
        return max((r.sendable_tokens(self.held_version) for r in self), default=0)

    @property
    def held_tokens(self) -> int:
        """Tokens that wait for a canary."""
        if self.held_version is None:
            return 0
        return sum(rollout.held_tokens(self.held_version) for rollout in self)

    @property
    def active(self) -> int:
        """Rollouts that are being generated."""
        return sum(1 for r in self if r.finish is None and not r.leaving)


def local_rollout(lease: Lease, segments: Sequence[Segment]) -> LocalRollout:
    """A rollout as leased: prefix and length from its decoded segments.

    Raises ``SchemaError`` when the segments do not fit together or their length is not the lease's.
    """
    response = join_segments(segments)
    prefix = tuple(int(token) for token in response.token_ids)
    return LocalRollout(lease, prefix, len(prefix))
