"""Short hands for broker tests: feed, lease, append, finish, grade, with sane defaults."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from ringasync.broker import core
from ringasync.broker.client import Broker
from ringasync.broker.types import (
    AppendItem,
    AppendStatus,
    Fence,
    GradeJob,
    Lease,
    MoveStatus,
    NewGroup,
    Verdict,
    VersionInfo,
)
from ringasync.records.segment import encode_segment, policy_segment

TTL_MS = 5000


@contextmanager
def altered_scripts(alter: Callable[[str, bytes], bytes]) -> Iterator[None]:
    """Within it the broker's client sends what ``alter`` makes of each script's name and text."""
    source = core.script_source
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            core, "script_source", lambda name, simulated: alter(name, source(name, simulated))
        )
        core._digest.cache_clear()
        yield
    core._digest.cache_clear()


def new_group(
    group_id: str, size: int = 2, kind: str = "train", quarantine_reason: str = ""
) -> NewGroup:
    """A group of small addition prompts."""
    return NewGroup(
        group_id=group_id,
        kind="eval" if kind == "eval" else "train",
        domain="sums",
        prompt="1+1=",
        prompt_ids=(1, 2, 3),
        task={"answer": "2"},
        source_index=7,
        size=size,
        max_new_tokens=64,
        quarantine_reason=quarantine_reason,
    )


def payload(start: int, length: int, version: int) -> bytes:
    """An encoded policy segment."""
    ids = list(range(start, start + length))
    return encode_segment(policy_segment(start, version, ids, [-0.5] * length))


def item(lease: Lease, start: int, length: int, version: int = 1) -> AppendItem:
    """An append of ``length`` policy tokens under a lease."""
    return AppendItem(
        lease.rollout_id,
        lease.token,
        start,
        length,
        length,
        version,
        payload(start, length, version),
    )


class Kit:
    """A broker with both role locks held and version 1 published; session names are made up."""

    def __init__(self, broker: Broker, coordinator: Fence, learner: Fence) -> None:
        self.broker, self.coordinator, self.learner = broker, coordinator, learner
        self.now_ms = 1_000_000
        self._requests = 0

    @classmethod
    async def make(cls, broker: Broker) -> Kit:
        """Take both locks and publish version 1."""
        coordinator = await broker.acquire_lock("coordinator", "c1", TTL_MS)
        learner = await broker.acquire_lock("learner", "l1", TTL_MS)
        await broker.publish(learner, VersionInfo(1, 0, 0, "{}"))
        return cls(broker, coordinator, learner)

    def request(self) -> str:
        """A fresh request id."""
        self._requests += 1
        return f"request-{self._requests}"

    async def advance(self, ms: int) -> None:
        """Let simulated time pass."""
        self.now_ms += ms
        await self.broker.client.set(self.broker.keys.sim_now, self.now_ms)

    async def expire_sessions(self, *alive: str) -> dict[str, int]:
        """Let every session but ``alive`` run out, in steps too small for a grace period; reap."""
        for _ in range(3):
            await self.advance(TTL_MS * 2 // 3)
            for session in alive:
                await self.broker.heartbeat(session, TTL_MS, {})
            await self.broker.renew_lock(self.coordinator, TTL_MS)
        return await self.broker.reap(self.coordinator, 3)

    async def feed(self, *group_ids: str, size: int = 2, kind: str = "train") -> None:
        """Feed groups."""
        groups = [new_group(group_id, size, kind) for group_id in group_ids]
        assert await self.broker.feed(self.coordinator, self.request(), groups, "c") == len(groups)

    async def session(self, name: str, role: str = "worker") -> str:
        """Open a session."""
        await self.broker.open_session(name, role, TTL_MS, {"worker": name})
        return name

    async def append(self, lease: Lease, start: int, length: int, version: int = 1) -> AppendStatus:
        """Append policy tokens under a lease."""
        return (await self.broker.append_many("w", [item(lease, start, length, version)]))[0]

    async def finish(self, lease: Lease, total: int, session: str = "w") -> MoveStatus:
        """Finish a rollout."""
        row = (lease.rollout_id, lease.token, "stop", total)
        return (await self.broker.finish_many(session, [row]))[0]

    async def park(self, lease: Lease, why: str = "drain", session: str = "w") -> MoveStatus:
        """Park a rollout."""
        row = (lease.rollout_id, lease.token, why)
        return (await self.broker.park_many(session, [row]))[0]

    async def grade(
        self,
        jobs: Sequence[GradeJob],
        rewards: Sequence[float | None],
        session: str = "w",
        filter_zero_variance: bool = True,
    ) -> list[MoveStatus]:
        """Grade jobs; None is an error."""
        verdicts = [
            Verdict(job.rollout_id, job.token, reward, "" if reward is not None else "boom", "text")
            for job, reward in zip(jobs, rewards, strict=True)
        ]
        return await self.broker.grade_many(session, verdicts, 3, filter_zero_variance, 8)

    async def ready(self, *group_ids: str, tokens: int = 4, version: int = 1) -> None:
        """Bring fresh groups of two to ready, through the whole protocol."""
        session = await self.session(f"ready-{'-'.join(group_ids)}")
        await self.feed(*group_ids)
        leases = await self.broker.take(session, 2 * len(group_ids), version)
        assert len(leases) == 2 * len(group_ids)
        for lease in leases:
            assert await self.append(lease, 0, tokens, version) == "ok"
            assert await self.finish(lease, tokens, session) == "ok"
        jobs = await self.broker.take_grading(session, len(leases))
        rewards = [float(job.rollout_id.endswith(".1")) for job in jobs]
        assert await self.grade(jobs, rewards, session) == ["ok"] * len(jobs)
        await self.broker.close_session(session)

    async def state(self, rollout_id: str) -> str:
        """A rollout's state."""
        fields = await self.broker.rollout(rollout_id)
        return fields["state"] if fields else "absent"

    async def group_state(self, group_id: str) -> str:
        """A group's state."""
        fields = await self.broker.group(group_id)
        return fields["state"] if fields else "absent"

    async def check(self) -> dict[str, int]:
        """Assert that the audit balances; returns the accounts that are not zero."""
        report = await self.broker.audit()
        assert report.balanced, (report.differences, report.problems)
        return {name: tokens for name, tokens in report.counters.items() if tokens}
