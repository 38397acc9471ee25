"""The whole protocol under random moves, on a real Redis with a simulated clock.

Hypothesis drives workers, graders, a learner with a journal, the coordinator, crashes and
rollbacks. After every move the audit must balance. Further invariants: each token is trained at
most once, nothing of a zombie is accepted, no lease token, version or fencing token comes twice.
``RINGASYNC_FUZZ_EXAMPLES=500 pytest ...`` searches longer, with random seeds.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Coroutine
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ringasync.broker.client import Broker
from ringasync.broker.types import TrainedTokens, Verdict, VersionInfo
from ringasync.errors import FencedError
from tests.conftest import CONFIG_HASH, RedisServer

from .kit import TTL_MS, Kit, item
from .protocol_model import Batch, Holding, Model, Records
from .snapshot import restore, snapshot

EXAMPLES = int(os.environ.get("RINGASYNC_FUZZ_EXAMPLES", "0"))
MAX_ATTEMPTS = 3
index = st.integers(0, 7)
T = TypeVar("T")


class ProtocolMachine(RuleBasedStateMachine):
    """Moves of every role; each asserts its own answer, ``balanced`` the rest."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.url = url
        self.model = Model()
        self.saved: tuple[dict[bytes, bytes], Records] | None = None
        self.count = 0

    def do(self, call: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(call)

    def next(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    @initialize(mode=st.sampled_from(["pipelined", "rounds"]))
    def start(self, mode: str) -> None:
        self.mode = mode
        self.do(self._start(mode))

    async def _start(self, mode: str) -> None:
        name = f"fuzz-{uuid.uuid4().hex[:12]}"
        self.broker = await Broker.connect(self.url, name, simulated_clock=True)
        await self.broker.create_run("", CONFIG_HASH, mode)
        await self.broker.client.set(self.broker.keys.sim_now, 1_000_000)
        self.kit = await Kit.make(self.broker)
        self.model.fences_seen = {self.kit.learner.token}

    def teardown(self) -> None:
        if hasattr(self, "broker"):
            self.do(self.broker.delete_run())
            self.do(self.broker.close())
        self.runner.close()

    # Coordinator

    @rule(size=st.integers(1, 3), kind=st.sampled_from(["train", "train", "train", "eval"]))
    def feed(self, size: int, kind: str) -> None:
        group_id = self.next("e" if kind == "eval" else "g")
        self.do(self.kit.feed(group_id, size=size, kind=kind))
        for number in range(size):
            self.model.records.lengths[f"{group_id}.{number}"] = 0
            self.model.records.retention[f"{group_id}.{number}"] = 0

    @rule(on=st.booleans())
    def pin(self, on: bool) -> None:
        self.do(self.broker.set_pin(self.kit.coordinator, on))

    @rule(dead=st.sets(index, max_size=2))
    def sessions_die(self, dead: set[int]) -> None:
        model = self.model
        gone = {s for number, s in enumerate(model.sessions) if number in dead}
        holders = self.holders()
        self.do(self.kit.expire_sessions(*(s for s in model.sessions if s not in gone)))
        for session in gone:
            model.sessions.remove(session)
            model.void_session(holders, session)
        self.void_what_ended()

    @precondition(lambda self: self.mode == "rounds")
    @rule()
    def round_moves_on(self) -> None:
        records, kit = self.model.records, self.kit
        if records.round_state == "none":
            records.round_id += 1
            self.do(self.broker.open_round(kit.coordinator, self.next("open"), records.round_id))
            records.round_state = "open"
        elif records.round_state == "open":
            request = self.next("close")
            for _ in range(2):
                self.do(self.broker.close_round(kit.coordinator, request, records.round_id))
            for rollout_id in records.retention:
                if self.do(kit.state(rollout_id)) in ("queued", "parked", "leased"):
                    records.retention[rollout_id] += 0 if rollout_id[0] == "e" else 1
            records.round_state = "closing"
        elif records.round_state == "closing":
            held = any(h.lease.kind == "train" for h in self.model.live())
            moved = self.do(self.broker.round_to_training(kit.coordinator, records.round_id))
            assert moved is not held
            records.round_state = "training" if moved else "closing"
        else:
            self.do(self.broker.finish_round(kit.learner, records.round_id))
            records.round_state = "none"

    @rule(sigma=st.integers(0, 2), action=st.sampled_from(["drop_group", "replace"]))
    def purge(self, sigma: int, action: str) -> None:
        request, records = self.next("purge"), self.model.records
        call = self.broker.purge
        purged = self.do(call(self.kit.coordinator, request, sigma, action))  # type: ignore[arg-type]
        assert self.do(call(self.kit.coordinator, request, sigma, "replace")) == purged
        for name in purged:
            if action == "drop_group":
                assert any(
                    v > sigma for r, v in records.retention.items() if r[: len(name)] == name
                )
                self.model.void_group(name)
                continue
            assert records.retention[name] > sigma
            self.model.void(name)
            group = self.do(self.broker.group(name.split(".")[0]))
            assert group is not None
            for number in group["members"].split(","):
                fresh = f"{name.split('.')[0]}.{number}"
                records.lengths.setdefault(fresh, 0)
                records.retention.setdefault(fresh, 0)

    # Workers

    @rule()
    def worker_joins(self) -> None:
        if len(self.model.sessions) < 3:
            self.model.sessions.append(self.do(self.kit.session(self.next("s"))))

    @precondition(lambda self: self.model.sessions)
    @rule(who=index, n=st.integers(1, 4), behind=st.booleans())
    def take(self, who: int, n: int, behind: bool) -> None:
        model = self.model
        session = model.sessions[who % len(model.sessions)]
        version = max(1, model.latest_version - int(behind))
        for lease in self.do(self.broker.take(session, n, version)):
            model.note_token(lease.token)
            assert lease.num_tokens == model.records.lengths[lease.rollout_id]
            assert lease.retention == model.records.retention[lease.rollout_id]
            assert (
                lease.kind == "eval" or self.mode != "rounds" or model.records.round_state == "open"
            )
            assert lease.group_id not in model.journalled_groups
            model.void(lease.rollout_id)
            model.holdings.append(Holding(lease, lease.num_tokens, version))
        del model.holdings[:-12]

    def pick(self, which: int, *, void: bool) -> Holding | None:
        found = [holding for holding in self.model.holdings if holding.void is void]
        return found[which % len(found)] if found else None

    @rule(which=index, length=st.integers(1, 4), newer=st.booleans())
    def append(self, which: int, length: int, newer: bool) -> None:
        holding = self.pick(which, void=False)
        if holding is None:
            return
        holding.version = self.model.latest_version if newer else holding.version
        one = item(holding.lease, holding.length, length, holding.version)
        assert self.do(self.broker.append_many("w", [one, one])) == ["ok", "duplicate"]
        assert self.do(self.broker.append_many("w", [one])) == ["duplicate"]
        holding.length += length
        self.model.records.lengths[holding.lease.rollout_id] = holding.length

    @rule(which=index)
    def zombie_acts(self, which: int) -> None:
        zombie = self.pick(which, void=True)
        if zombie is None:
            return
        one = item(zombie.lease, zombie.length, 2, zombie.version)
        assert self.do(self.broker.append_many("w", [one]))[0] in ("fenced", "gone")
        refused = ("fenced", "gone", "duplicate")
        assert self.do(self.kit.finish(zombie.lease, zombie.length)) in refused
        assert self.do(self.kit.park(zombie.lease)) in refused

    @rule(which=index, why=st.sampled_from(["drain", "error: engine"]))
    def park(self, which: int, why: str) -> None:
        holding = self.pick(which, void=False)
        if holding is not None:
            assert self.do(self.kit.park(holding.lease, why)) == "ok"
            assert self.do(self.kit.park(holding.lease, why)) in ("duplicate", "gone")
            self.model.void(holding.lease.rollout_id)
            self.void_what_ended()

    @rule(which=index)
    def finish(self, which: int) -> None:
        holding = self.pick(which, void=False)
        if holding is not None:
            assert self.do(self.kit.finish(holding.lease, holding.length)) == "ok"
            assert self.do(self.kit.finish(holding.lease, holding.length)) == "duplicate"
            self.model.void(holding.lease.rollout_id)

    @precondition(lambda self: self.count % 4 == 0)
    @rule(which=index)
    def quarantine(self, which: int) -> None:
        holding = self.pick(which, void=False)
        if holding is not None:
            row = (holding.lease.rollout_id, holding.lease.token, "broken record")
            assert self.do(self.broker.quarantine_many("w", [row])) == ["ok"]
            self.model.void_group(holding.lease.group_id)

    @precondition(lambda self: self.model.sessions)
    @rule(who=index)
    def worker_leaves(self, who: int) -> None:
        session = self.model.sessions.pop(who % len(self.model.sessions))
        holders = self.holders()
        self.do(self.broker.close_session(session))
        self.model.void_session(holders, session)

    # Graders

    @precondition(lambda self: self.model.sessions)
    @rule(who=index, n=st.integers(1, 4))
    def take_grading(self, who: int, n: int) -> None:
        session = self.model.sessions[who % len(self.model.sessions)]
        for job in self.do(self.broker.take_grading(session, n)):
            self.model.note_token(job.token)
            self.model.void(job.rollout_id)
            self.model.jobs.append((job, False))

    @precondition(lambda self: self.model.jobs)
    @rule(which=index, reward=st.sampled_from([0.0, 1.0, 1.0, 0.5, None]))
    def grade(self, which: int, reward: float | None) -> None:
        job, void = self.model.jobs.pop(which % len(self.model.jobs))
        verdict = Verdict(job.rollout_id, job.token, reward, "" if reward is not None else "boom")
        call = self.broker.grade_many
        statuses = self.do(call("w", [verdict], MAX_ATTEMPTS, True, 4))
        assert statuses[0] in (("fenced", "gone") if void else ("ok",))
        again = self.do(call("w", [verdict], MAX_ATTEMPTS, True, 4))
        assert again[0] in ("fenced", "gone", "duplicate")
        self.void_what_ended()

    # Learner

    @rule()
    def publish(self) -> None:
        version = self.model.latest_version + 1
        self.do(self.broker.publish(self.kit.learner, VersionInfo(version, version, 0, "{}")))
        self.model.versions_seen.append(version)

    @precondition(lambda self: not self.model.learner.reserved and self.idle())
    @rule(n=st.integers(1, 3))
    def reserve(self, n: int) -> None:
        learner = self.model.learner
        ready = self.do(self.broker.ready_groups(n))
        if ready:
            learner.batches += 1
            batch_id = f"b{learner.batches}"
            ids = [group.group_id for group in ready]
            call = self.broker.reserve
            groups, stale = self.do(call(self.kit.learner, batch_id, ids, 0, 10**6))
            assert self.do(call(self.kit.learner, batch_id, ids, 0, 10**6)) == (groups, stale)
            assert [group.group_id for group in groups] == ids
            learner.reserved, learner.reserved_groups = batch_id, tuple(groups)

    @precondition(lambda self: self.model.learner.reserved)
    @rule(keep=st.integers(0, 2), mask=st.booleans())
    def journal(self, keep: int, mask: bool) -> None:
        self.model.journal(keep, mask)

    @precondition(lambda self: not self.idle())
    @rule()
    def learner_works(self) -> None:
        """One step forward: commit what is journalled, or train what is committed."""
        learner = self.model.learner
        if learner.committed < len(learner.journal):
            for _ in range(2):
                self.do(self.commit(learner.journal[learner.committed]))
            learner.committed += 1
        else:
            for _ in range(2):
                self.do(self.train(learner.journal[learner.trained]))
            learner.trained += 1

    @rule()
    def learner_crashes(self) -> None:
        """Another learner takes over; the old one is fenced; the journal settles the rest."""
        old = self.kit.learner
        self.do(self.broker.release_lock(old))
        self.kit.learner = self.do(self.broker.acquire_lock("learner", "next", TTL_MS))
        assert self.kit.learner.token not in self.model.fences_seen
        self.model.fences_seen.add(self.kit.learner.token)
        for call in (self.broker.release(old, "b1"), self.broker.commit(old, "b1", {})):
            try:
                self.do(call)
            except FencedError:
                continue
            raise AssertionError("a fenced learner was obeyed")
        self.model.learner.reserved, self.model.learner.reserved_groups = "", ()
        self.do(self.settle())

    def idle(self) -> bool:
        learner = self.model.learner
        return learner.trained == len(learner.journal)

    async def commit(self, batch: Batch) -> None:
        counts = {group_id: len(rollouts) for group_id, rollouts in batch.groups.items()}
        await self.broker.commit(self.kit.learner, batch.batch_id, counts)

    async def train(self, batch: Batch) -> None:
        items, masked = [], batch.masked
        for group_id, rollouts in batch.parts.items():
            tokens = sum(rollouts.values())
            cut = min(masked, tokens)
            masked -= cut
            rest = len(batch.carried.get(group_id, {}))
            items.append(TrainedTokens(group_id, tokens - cut, cut, rest))
        await self.broker.mark_trained(self.kit.learner, batch.batch_id, items, 1)

    async def settle(self) -> None:
        """What a restarted learner does: the journal decides, not Redis."""
        known = await self.broker.batches()
        journalled = {batch.batch_id for batch in self.model.learner.journal}
        for batch_id, state in known.items():
            if batch_id not in journalled:
                assert state == "reserved"
                await self.broker.release(self.kit.learner, batch_id)
        for number, batch in enumerate(self.model.learner.journal):
            state = known.get(batch.batch_id, "lost")
            if state == "lost":
                groups = {g: (sum(r.values()), len(r)) for g, r in batch.groups.items()}
                await self.broker.force_taken(self.kit.learner, batch.batch_id, groups)
            elif state == "reserved":
                await self.commit(batch)
            if number < self.model.learner.trained and state != "trained":
                await self.train(batch)
        self.model.learner.committed = len(self.model.learner.journal)
        for group_id in self.model.journalled_groups:
            self.model.void_group(group_id)

    # Redis

    @rule()
    def redis_saves(self) -> None:
        self.saved = (self.do(snapshot(self.broker)), self.model.save())

    @precondition(lambda self: self.saved is not None)
    @rule()
    def redis_loses_its_tail(self) -> None:
        assert self.saved is not None
        keys, records = self.saved
        self.do(self.roll_back(keys))
        self.model.records, self.saved = records, None
        self.model.void_everything()
        self.model.learner.reserved, self.model.learner.reserved_groups = "", ()
        self.do(self.settle())

    async def roll_back(self, keys: dict[bytes, bytes]) -> None:
        await restore(self.broker, keys)
        await self.broker.client.hset(self.broker.keys.meta, "server_run_id", "before")
        for role in ("coordinator", "learner"):
            await self.broker.client.delete(self.broker.keys.lock(role))
        self.kit.coordinator = await self.broker.acquire_lock("coordinator", "c", TTL_MS)
        self.kit.learner = await self.broker.acquire_lock("learner", "l", TTL_MS)
        assert self.kit.learner.token not in self.model.fences_seen
        self.model.fences_seen.add(self.kit.learner.token)
        assert await self.broker.check_incarnation(self.kit.coordinator) is not None
        meta = await self.broker.run_meta()
        latest = max(self.model.latest_version, int(meta["latest_version"])) + 1
        await self.broker.publish(self.kit.learner, VersionInfo(latest, latest, 0, "{}"))
        self.model.versions_seen.append(latest)

    # Looking

    def holders(self) -> dict[str, str]:
        """Who holds which rollout, by the leases the broker keeps for each session."""
        held: dict[str, str] = {}
        for session in self.model.sessions:
            key = self.broker.keys.leases(session)
            for member in self.do(self.members(key)):
                held[member] = session
        return held

    async def members(self, key: str) -> list[str]:
        return [member.decode() for member in await self.broker.client.smembers(key)]

    def void_what_ended(self) -> None:
        """A move may have ended a group by its own rules (attempts, last verdict)."""
        for group_id in {h.lease.group_id for h in self.model.live()}:
            if self.do(self.kit.group_state(group_id)) != "open":
                self.model.void_group(group_id)
        for job, void in self.model.jobs:
            if not void and self.do(self.kit.group_state(job.group_id)) != "open":
                self.model.void_group(job.group_id)

    @invariant()
    def balanced(self) -> None:
        if hasattr(self, "kit"):
            self.do(self.kit.check())

    @invariant()
    def nothing_is_trained_twice(self) -> None:
        trained = self.model.trained_rollouts()
        assert len(trained) == len(set(trained))


def test_the_protocol_under_random_moves(redis_server: RedisServer) -> None:
    """Both versions; derandomised unless more examples are asked for."""
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        lambda: ProtocolMachine(redis_server.url),
        settings=settings(
            max_examples=EXAMPLES or 60,
            stateful_step_count=50,
            deadline=None,
            derandomize=not EXAMPLES,
            suppress_health_check=list(HealthCheck),
        ),
    )
