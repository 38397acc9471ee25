"""What the broker takes and gives: plain frozen dataclasses, no Redis in them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

TicketKind = Literal["train", "eval"]


@dataclass(frozen=True, slots=True)
class Fence:
    """Proof of a role lock: every coordinator and learner script checks ``token``."""

    role: str
    owner: str
    token: int


@dataclass(frozen=True, slots=True)
class NewGroup:
    """A prompt to feed. ``prompt_ids`` are final: worker and learner both use these.

    ``task`` is the verifier's JSON data, ``source_index`` the position in the data mixture.
    ``quarantine_reason`` non-empty: the group is created ended (bad prompt), with no rollouts.
    """

    group_id: str
    kind: TicketKind
    domain: str
    prompt: str
    prompt_ids: tuple[int, ...]
    task: dict[str, Any]
    source_index: int
    size: int
    max_new_tokens: int
    quarantine_reason: str = ""


@dataclass(frozen=True, slots=True)
class Lease:
    """A session's exclusive right to one rollout, with all that is needed to generate on.

    ``segments`` are the encoded list elements so far (empty for a fresh rollout), ``num_tokens``
    their total length, ``token`` the fencing token ``incarnation.epoch.nonce``.
    ``pin_version`` is set for eval rollouts: only this policy version may generate them.
    ``unreadable`` says why the prompt stored in Redis is none, with ``prompt_ids`` empty then.
    """

    rollout_id: str
    group_id: str
    token: str
    kind: TicketKind
    prompt_ids: tuple[int, ...]
    segments: tuple[bytes, ...]
    num_tokens: int
    max_new_tokens: int
    seed: int
    retention: int
    attempts: int
    pin_version: int | None = None
    unreadable: str = ""


AppendStatus = Literal["ok", "duplicate", "fenced", "gone", "gap", "full"]
"""``ok`` appended; ``duplicate`` was there already; ``fenced`` the lease is not yours any more;
``gone`` the rollout ended (purged, quarantined, trained); ``gap`` start offset beyond the end;
``full`` Redis is at its memory limit: keep the tokens and try again."""


@dataclass(frozen=True, slots=True)
class AppendItem:
    """One segment to append under a lease; ``num_tokens`` counts policy tokens only."""

    rollout_id: str
    token: str
    start: int
    length: int
    num_tokens: int
    policy_version: int
    payload: bytes


MoveStatus = Literal["ok", "duplicate", "fenced", "gone", "full"]


@dataclass(frozen=True, slots=True)
class GradeJob:
    """A finished rollout to score. ``token`` fences the verdict. ``unreadable`` says why the task
    stored in Redis is none, with ``task`` empty then."""

    rollout_id: str
    group_id: str
    token: str
    kind: TicketKind
    domain: str
    prompt: str
    task: dict[str, Any]
    segments: tuple[bytes, ...]
    finish_reason: str
    attempts: int
    unreadable: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A verifier's answer: a finite ``reward``, or an ``error`` (never both)."""

    rollout_id: str
    token: str
    reward: float | None
    error: str = ""
    text: str = ""
    """Decoded response for ``ringasync samples``; kept in a short list only."""


@dataclass(frozen=True, slots=True)
class Poll:
    """What a heartbeat brings back: everything a role must notice, read atomically."""

    alive: bool
    """False: the session expired, its leases are void; open a new one."""
    phase: str
    paused: bool
    latest_version: int
    """0 while nothing is published."""
    pin_version: int | None
    """Set while an evaluation runs: do not load a newer version than this."""
    bad_versions: tuple[int, ...]
    round_id: int
    round_state: Literal["none", "open", "closing", "training"]
    """``closing``: park every train rollout now."""
    incarnation: int
    learner_step: int
    device_turn: int = 0
    """``schedule.colocated``: odd while the learner asks for the device or has it. Only rises."""


@dataclass(frozen=True, slots=True)
class DeviceClaim:
    """The learner's claim on the device under an odd ``turn``; ``owed_by`` empty: it has it."""

    turn: int
    owed_by: tuple[str, ...]
    """One line for each worker that has not said that it sleeps in this turn."""


@dataclass(frozen=True, slots=True)
class ReadyGroup:
    """A group that may be reserved."""

    group_id: str
    num_tokens: int
    min_version: int
    domain: str


@dataclass(frozen=True, slots=True)
class RawRollout:
    """A graded rollout as stored; the learner decodes and checks it."""

    rollout_id: str
    reward: float
    finish_reason: str
    retention: int
    segments: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class RawGroup:
    """A reserved group with its rollouts' payloads. ``unreadable`` says why the prompt stored in
    Redis is none, with ``prompt_ids`` empty then."""

    group_id: str
    domain: str
    prompt_ids: tuple[int, ...]
    source_index: int
    rollouts: tuple[RawRollout, ...]
    unreadable: str = ""


@dataclass(frozen=True, slots=True)
class TrainedTokens:
    """What one batch did to one taken group. ``masked_tokens`` is the tail the budget cut.

    ``open_trajectories`` of the group are still untrained (carried to a later batch).
    """

    group_id: str
    trained_tokens: int
    masked_tokens: int
    open_trajectories: int


@dataclass(frozen=True, slots=True)
class VersionInfo:
    """One announced policy version."""

    version: int
    learner_step: int
    fork_step: int
    manifest: str
    """The manifest as JSON."""


@dataclass(frozen=True, slots=True)
class Backlog:
    """Counts that scheduling looks at, read in one script."""

    open_groups: int
    open_rollouts: int
    """Queued, parked or leased train rollouts."""
    running_rollouts: int
    ready_groups: int
    ready_tokens: int
    admitted_tokens_known: int
    """Tokens of admitted, unended groups whose rollouts are finished."""
    admitted_rollouts_unfinished: int
    reserved_tokens: int
    taken_tokens: int
    finished_tokens_round: int
    """Tokens counted for the present round under ``completed``."""
    generated_tokens_round: int
    trainable_tokens_round: int
    eval_open: int
    queued_tickets: int
    grading_jobs: int
    paused_feeding: str
    """Non-empty: why feeding is stopped (quarantine breaker)."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one group ended, from the outcomes stream: the source of reward and length metrics."""

    entry_id: str
    group_id: str
    kind: TicketKind
    domain: str
    end: str
    """A GroupState: ready, filtered, evaluated, stale, purged, quarantined, grade_error, lost."""
    rewards: tuple[float, ...]
    lengths: tuple[int, ...]
    versions: tuple[int, ...]
    """Minimum and maximum policy version, when known."""
    retention: int
    reason: str
    at_ms: int
    rollout_id: str = ""
    """Set when only this rollout ended (purged and replaced); its group goes on."""


@dataclass(frozen=True, slots=True)
class AuditReport:
    """The ledger recomputed from the records and compared with its counters."""

    balanced: bool
    accepted_tokens: int
    counters: dict[str, int]
    recomputed: dict[str, int]
    differences: dict[str, int] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    """Broken links found on the way: leases without session, groups with wrong counts..."""


@dataclass(frozen=True, slots=True)
class RolloutView:
    """A rollout for people: ``tokens`` are the policy's so far."""

    id: str
    state: str
    tokens: int


@dataclass(frozen=True, slots=True)
class GroupView:
    """A group for people, with its rollouts in the order of their numbers."""

    id: str
    state: str
    domain: str
    rollouts: tuple[RolloutView, ...]


@dataclass(frozen=True, slots=True)
class RolloutLife:
    """What Redis still knows of one rollout: its fields and its transitions, oldest first."""

    id: str
    fields: dict[str, str]
    history: tuple[dict[str, Any], ...]
