"""What the broker must have done, kept beside it: the model of the protocol state machine."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from ringasync.broker.types import GradeJob, Lease, RawGroup
from ringasync.records.segment import decode_segment
from ringasync.records.trajectory import join_segments


@dataclass
class Holding:
    """A lease as its worker sees it; ``void`` once the broker must refuse it."""

    lease: Lease
    length: int
    version: int
    void: bool = False
    last_start: int = -1
    last_length: int = 0


@dataclass
class Records:
    """The broker's side: what a rollback turns back."""

    lengths: dict[str, int] = field(default_factory=dict)
    retention: dict[str, int] = field(default_factory=dict)
    round_id: int = 0
    round_state: str = "none"


@dataclass
class Batch:
    """One journalled batch: tokens of every rollout of its groups, and what it trains."""

    batch_id: str
    groups: dict[str, dict[str, int]]
    parts: dict[str, dict[str, int]]
    """Trained by this batch: group -> rollout -> tokens, rollouts carried from before included."""
    carried: dict[str, dict[str, int]]
    """Left for the next batch."""
    masked: int = 0
    """Tokens cut from the last rollout."""


@dataclass
class Learner:
    """The learner's side: the journal survives everything, the rest dies in a crash."""

    journal: list[Batch] = field(default_factory=list)
    reserved: str = ""
    reserved_groups: tuple[RawGroup, ...] = ()
    committed: int = 0
    trained: int = 0
    batches: int = 0

    @property
    def carried(self) -> dict[str, dict[str, int]]:
        """Rollouts that the next batch trains first."""
        return self.journal[-1].carried if self.journal else {}


class Model:
    """Everything the machine knows."""

    def __init__(self) -> None:
        self.records = Records()
        self.learner = Learner()
        self.sessions: list[str] = []
        self.holdings: list[Holding] = []
        self.jobs: list[tuple[GradeJob, bool]] = []
        """Grading jobs, with whether they are void."""
        self.tokens_seen: set[tuple[str, str]] = set()
        self.versions_seen: list[int] = [1]
        self.fences_seen: set[int] = set()
        self.journalled_groups: set[str] = set()

    @property
    def latest_version(self) -> int:
        """The newest published version."""
        return self.versions_seen[-1]

    def note_token(self, rollout_id: str, token: str) -> None:
        """No lease token of a rollout is handed out twice, whatever happened to Redis."""
        assert (rollout_id, token) not in self.tokens_seen, f"{rollout_id}: {token} came twice"
        self.tokens_seen.add((rollout_id, token))

    def live(self) -> list[Holding]:
        """Leases that the broker must honour."""
        return [holding for holding in self.holdings if not holding.void]

    def forget_old_zombies(self) -> None:
        """Keep the newest void leases only."""
        old = [holding for holding in self.holdings if holding.void][:-12]
        self.holdings = [holding for holding in self.holdings if holding not in old]

    def void(self, rollout_id: str) -> None:
        """Whoever holds this rollout is a zombie now."""
        for holding in self.holdings:
            if holding.lease.rollout_id == rollout_id:
                holding.void = True
        self.jobs = [(job, void or job.rollout_id == rollout_id) for job, void in self.jobs]

    def void_group(self, group_id: str) -> None:
        """The group ended: all its leases and jobs are void."""
        for holding in self.holdings:
            holding.void |= holding.lease.group_id == group_id
        self.jobs = [(job, void or job.group_id == group_id) for job, void in self.jobs]

    def void_session(self, holders: dict[str, str], session: str) -> None:
        """The session ended: all it held is void."""
        for rollout_id, holder in holders.items():
            if holder == session:
                self.void(rollout_id)

    def void_everything(self) -> None:
        """A new incarnation began."""
        self.sessions = []
        for holding in self.holdings:
            holding.void = True
        self.jobs = [(job, True) for job, _ in self.jobs]

    def save(self) -> Records:
        """The broker's side, for a rollback."""
        return copy.deepcopy(self.records)

    def check_reserved(self, group: RawGroup) -> dict[str, int]:
        """A reserved group holds exactly what was accepted, and was never journalled before."""
        assert group.group_id not in self.journalled_groups, f"{group.group_id} would train twice"
        sizes = {}
        for rollout in group.rollouts:
            flat = join_segments([decode_segment(segment) for segment in rollout.segments])
            expected = list(range(self.records.lengths[rollout.rollout_id]))
            assert flat.token_ids.tolist() == expected, (
                f"{rollout.rollout_id} lost or gained tokens"
            )
            sizes[rollout.rollout_id] = len(expected)
        return sizes

    def journal(self, keep: int, mask: bool) -> Batch:
        """Turn the reservation into a journalled batch; ``keep`` rollouts are carried over."""
        learner = self.learner
        groups = {g.group_id: self.check_reserved(g) for g in learner.reserved_groups}
        parts: dict[str, dict[str, int]] = copy.deepcopy(learner.carried)
        for group_id, sizes in groups.items():
            parts.setdefault(group_id, {}).update(sizes)
        order = [(g, r) for g, rollouts in parts.items() for r in rollouts]
        carried: dict[str, dict[str, int]] = {}
        for group_id, rollout_id in order[len(order) - min(keep, len(order) - 1) :]:
            carried.setdefault(group_id, {})[rollout_id] = parts[group_id].pop(rollout_id)
        masked = (
            1
            if mask and any(n > 0 for rollouts in parts.values() for n in rollouts.values())
            else 0
        )
        batch = Batch(learner.reserved, groups, parts, carried, masked)
        learner.journal.append(batch)
        self.journalled_groups |= set(groups)
        learner.reserved, learner.reserved_groups = "", ()
        return batch

    def trained_rollouts(self) -> list[str]:
        """Every rollout that any journalled batch trains, with repeats if there were any."""
        return [r for batch in self.learner.journal for p in batch.parts.values() for r in p]
