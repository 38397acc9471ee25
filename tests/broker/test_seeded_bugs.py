"""Tests of the test: known bugs, put into the scripts or the learner, are found by random moves.

A protocol machine that finds nothing proves little by itself. Each bug here is one that a person
might make; the machine of ``test_protocol_machine`` must fail with it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pytest

from tests.conftest import RedisServer

from .kit import altered_scripts
from .protocol_model import Model
from .test_protocol_machine import ProtocolMachine, search

pytestmark = pytest.mark.timeout(600)
EXAMPLES = 60


@dataclass(frozen=True)
class Bug:
    """In ``script``, ``right`` is replaced by ``wrong``; it is there exactly once."""

    name: str
    script: str
    right: str
    wrong: str


BUGS = [
    Bug(
        "an append without the lease token",
        "append_many",
        "r[LEASE] ~= token or r[STATE] ~= 'leased' or length <= 0",
        "r[STATE] ~= 'leased' or length <= 0",
    ),
    Bug(
        "an append that does not look where it begins",
        "append_many",
        "if r[LENGTH] ~= start or r[LEASE]",
        "if r[LEASE]",
    ),
    Bug(
        "a verdict without the lease token",
        "grade_many",
        "r.state ~= 'grading' or r.lease ~= token",
        "r.state ~= 'grading'",
    ),
    Bug(
        "a park without the lease token",
        "park_many",
        "r.state ~= 'leased' or r.lease ~= token",
        "r.state ~= 'leased'",
    ),
    Bug(
        "a finish that books the tokens of its own lease alone",
        "finish_many",
        "shift(r.kind, 'open', 'finished', r.tokens)",
        "shift(r.kind, 'open', 'finished', r.progress)",
    ),
    Bug(
        "a commit that is made twice",
        "commit",
        "if found[1] ~= 'reserved' then return 0 end",
        "",
    ),
    Bug(
        "a commit by a learner that was replaced",
        "commit",
        "if refused then return refused end",
        "",
    ),
    Bug(
        "a reserved group that stays ready",
        "reserve",
        "call('ZREM', P .. 'ready', gid)\n        count_group",
        "count_group",
    ),
    Bug(
        "a batch that is trained twice",
        "mark_trained",
        "if state == 'trained' then return 0 end",
        "",
    ),
    Bug(
        "a new incarnation that leaves leases standing",
        "begin_incarnation",
        "if r and r.state == 'leased' then",
        "if r and r.state == 'never' then",
    ),
    Bug(
        "a lease token without the epoch and the caller's nonce",
        "take",
        "(m[1] or '1') .. '.' .. (r.epoch + 1) .. '.' .. nonce",
        "(m[1] or '1') .. '.' .. (r.epoch > 1 and 1 or r.epoch + 1)",
    ),
    Bug(
        "a take that hands out rollouts of newer weights",
        "take",
        "if high > loaded then",
        "if false then",
    ),
    Bug(
        "journalled groups that Redis gives out again after it lost its tail",
        "force_taken",
        "call('ZREM', P .. 'ready', gid)\n    call('SADD', P .. 'live', gid)",
        "call('SADD', P .. 'live', gid)",
    ),
]


def seeded(bug: Bug) -> AbstractContextManager[None]:
    """The broker's client sends the wrong script within."""

    def alter(name: str, text: bytes) -> bytes:
        if name != bug.script:
            return text
        assert text.count(bug.right.encode()) == 1, f"{bug.script} does not read {bug.right!r} once"
        return text.replace(bug.right.encode(), bug.wrong.encode())

    return altered_scripts(alter)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "-"))
def test_a_wrong_script_is_found(redis_server: RedisServer, bug: Bug) -> None:
    with seeded(bug), pytest.raises(Exception) as found:  # noqa: PT011 - any failure will do
        search(ProtocolMachine, redis_server.url, EXAMPLES)
    assert found.value is not None
    assert not str(found.value).startswith(bug.script + " does not read"), str(found.value)


class CommitsFirst(ProtocolMachine):
    """A learner that tells Redis before it wrote its journal: what a crash between them loses."""

    def learner_works(self, n: int, keep: int, mask: bool) -> None:
        learner = self.model.learner
        if learner.reserved:
            counts = {g.group_id: len(g.rollouts) for g in learner.reserved_groups}
            self.do(self.broker.commit(self.kit.learner, learner.reserved, counts))
            if mask:
                return  # the process is killed here, before the record is on disk
        super().learner_works(n, keep, mask)


class ForgetsItsJournal(ProtocolMachine):
    """A learner that starts from Redis alone and trains what it was given a second time."""

    async def settle(self) -> None:
        self.model.learner.committed = len(self.model.learner.journal)


class ForgetsCarried(ProtocolMachine):
    """A learner that trains the whole of a group whose rest it carries over as well."""

    def learner_works(self, n: int, keep: int, mask: bool) -> None:
        super().learner_works(n, keep, mask)
        for batch in self.model.learner.journal[-1:]:
            for group_id, rest in batch.carried.items():
                batch.parts.setdefault(group_id, {}).update(rest)


@pytest.mark.parametrize("learner", [CommitsFirst, ForgetsItsJournal, ForgetsCarried])
def test_a_wrong_learner_is_found(
    redis_server: RedisServer, learner: type[ProtocolMachine]
) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011 - any failure will do
        search(learner, redis_server.url, EXAMPLES)


def test_the_seeding_itself_is_harmless(redis_server: RedisServer) -> None:
    """With nothing replaced the same search passes, so it is the bugs that are found."""
    same: Any = Bug("none", "commit", "free()\n", "free()\n")
    with seeded(same):
        search(ProtocolMachine, redis_server.url, EXAMPLES)
    assert Model().latest_version == 1
