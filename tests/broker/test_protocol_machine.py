"""The whole protocol under random moves, on a real Redis with a simulated clock.

Hypothesis drives workers, graders, a learner with a journal, the coordinator, crashes and
rollbacks. After every move the audit must balance. Further invariants: each token is trained at
most once, nothing of a zombie is accepted, no lease token, version or fencing token comes twice.
``RINGASYNC_FUZZ_EXAMPLES=500 pytest ...`` searches longer, with random seeds.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule, run_state_machine_as_test

from ringasync.broker.types import TrainedTokens, VersionInfo
from ringasync.errors import FencedError
from tests.conftest import RedisServer
from tests.draws import same_draws

from .kit import TTL_MS
from .protocol_model import Batch
from .protocol_moves import WorkMoves
from .snapshot import restore, snapshot

MOVES = (
    *("feed", "take", "take", "append", "append", "append", "park", "finish", "take_grading"),
    *("grade", "work", "work", "work", "learn", "learn"),
    *("round", "round", "round", "round", "round"),
    *(
        "zombie",
        "zombie",
        "zombie_grader",
        "join",
        "leave",
        "die",
        "quarantine",
        "purge",
        "pin",
        "publish",
    ),
    *("crash", "crash", "save", "rollback"),
)
"""Weighted: what ends or resets much is rarer than work."""
EXAMPLES = int(os.environ.get("RINGASYNC_FUZZ_EXAMPLES", "0"))


class ProtocolMachine(WorkMoves):
    """The learner, its journal, Redis losing its tail, and what must hold after every move."""

    @rule(
        kind=st.sampled_from(MOVES),
        which=st.integers(0, 7),
        n=st.integers(1, 4),
        flag=st.booleans(),
    )
    def move(self, kind: str, which: int, n: int, flag: bool) -> None:
        """One move of anybody. One rule, because hypothesis would leave most of many rules out."""
        work: dict[str, Callable[[], None]] = {
            "feed": lambda: self.feed(1 + n % 3, "eval" if which == 0 else "train"),
            "take": lambda: self.take(which, n, flag),
            "append": lambda: self.append(which, n, flag),
            "park": lambda: self.park(which, "drain" if flag else "error: engine"),
            "finish": lambda: self.finish(which),
            "take_grading": lambda: self.take_grading(which, n),
            "grade": lambda: self.grade(which, (0.0, 1.0, 0.5, None)[n - 1]),
            "work": lambda: self.everything_is_finished_and_graded(which),
            "learn": lambda: self.learner_works(n if flag else 1, which % 3, flag),
            "round": self.round_moves_on,
            "zombie": lambda: self.zombie_acts(which),
            "zombie_grader": lambda: self.zombie_grades(which),
            "join": self.worker_joins,
            "leave": lambda: self.worker_leaves(which),
            "die": lambda: self.sessions_die({which % 4, n}),
            "quarantine": lambda: self.quarantine(which),
            "purge": lambda: self.purge(n % 3, "replace" if flag else "drop_group"),
            "pin": lambda: self.do_pin(flag),
            "publish": self.publish,
            "crash": lambda: self.learner_crashes(n - 1, flag),
            "save": self.redis_saves,
            "rollback": self.redis_loses_its_tail,
        }
        work[kind]()

    # Learner

    def learner_works(self, n: int, keep: int, mask: bool) -> None:
        """One to four steps of: reserve, journal, commit, train. Every call comes twice."""
        learner = self.model.learner
        for _ in range(n):
            if learner.reserved:
                self.model.journal(keep, mask)
            elif learner.committed < len(learner.journal):
                for _ in range(2):
                    self.do(self.commit(learner.journal[learner.committed]))
                learner.committed += 1
            elif not self.idle():
                for _ in range(2):
                    self.do(self.train(learner.journal[learner.trained]))
                learner.trained += 1
            else:
                self.reserve(n)

    def reserve(self, n: int) -> None:
        learner = self.model.learner
        ids = [group.group_id for group in self.do(self.broker.ready_groups(n))]
        if not ids:
            return
        learner.batches += 1
        batch_id, call = f"b{learner.batches}", self.broker.reserve
        groups, stale = self.do(call(self.kit.learner, batch_id, ids, 0, 10**6))
        assert self.do(call(self.kit.learner, batch_id, ids, 0, 10**6)) == (groups, stale)
        assert [group.group_id for group in groups] == ids
        learner.reserved, learner.reserved_groups = batch_id, tuple(groups)

    def learner_crashes(self, after: int, mask: bool) -> None:
        """Another learner takes over; the old one is fenced; the journal settles the rest."""
        self.learner_works(after, 1, mask)
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

    def redis_saves(self) -> None:
        self.saved = (self.do(snapshot(self.broker)), self.model.save())

    def redis_loses_its_tail(self) -> None:
        if self.saved is None:
            return self.redis_saves()
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

    @invariant()
    def balanced(self) -> None:
        if hasattr(self, "kit"):
            self.do(self.kit.check())

    @invariant()
    def nothing_is_trained_twice(self) -> None:
        trained = self.model.trained_rollouts()
        assert len(trained) == len(set(trained))


def search(machine: type[ProtocolMachine], url: str, examples: int, *, anew: bool = False) -> None:
    """Raises what the first failing example raises; the same examples every time but ``anew``."""
    with same_draws():
        run_state_machine_as_test(
            type("Machine", (machine,), {"url": url}),
            settings=settings(
                max_examples=examples,
                stateful_step_count=70,
                deadline=None,
                derandomize=not anew,
                phases=[Phase.generate, Phase.shrink] if anew else [Phase.generate],
                report_multiple_bugs=anew,
                suppress_health_check=list(HealthCheck),
            ),
        )


@pytest.mark.timeout(600)
def test_the_protocol_under_random_moves(redis_server: RedisServer) -> None:
    """Both versions; the same examples every time unless more are asked for."""
    search(ProtocolMachine, redis_server.url, EXAMPLES or 80, anew=bool(EXAMPLES))
