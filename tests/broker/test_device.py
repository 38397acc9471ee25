"""Whose turn it is on a shared device: nobody meets another on it, nobody waits for ever."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from ringasync.broker.types import DeviceClaim
from ringasync.errors import FencedError

from .kit import TTL_MS, Kit


async def turn_of(kit: Kit, session: str = "w") -> int:
    """The turn that a heartbeat brings."""
    return (await kit.broker.heartbeat(session, TTL_MS, {})).device_turn


async def sleeps(kit: Kit, session: str, turn: int) -> None:
    """The worker's report."""
    status = {"asleep_turn": turn, "device_turn": turn}
    await kit.broker.heartbeat(session, TTL_MS, status)


async def test_the_learner_waits_for_every_worker_and_names_them(kit: Kit) -> None:
    broker = kit.broker
    for name in ("v", "w"):
        await kit.session(name)
    await kit.session("g", "grader")
    assert await turn_of(kit) == 0
    claim = await broker.take_device(kit.learner, 0)
    assert (claim.turn, await turn_of(kit)) == (1, 1)
    assert [line.split()[0] for line in claim.owed_by] == ["v", "w"]
    await sleeps(kit, "v", 1)
    claim = await broker.take_device(kit.learner, 0)
    assert (claim.turn, len(claim.owed_by)) == (1, 1)
    await kit.expire_sessions("v")  # w is dead: its session ends, and nobody waits for it
    assert (await broker.take_device(kit.learner, 0)).owed_by == ()
    await kit.session("late")
    assert await turn_of(kit, "late") == 1  # who joins meanwhile is told before it has an engine
    assert await broker.return_device(kit.learner, 1)
    assert not await broker.return_device(kit.learner, 1)
    assert await turn_of(kit, "late") == 2
    claim = await broker.take_device(kit.learner, 0)
    assert (claim.turn, len(claim.owed_by)) == (3, 2)  # v's report of turn 1 does not count


async def test_a_successor_takes_the_turn_over_and_the_old_learner_is_fenced(kit: Kit) -> None:
    broker = kit.broker
    await kit.session("w")
    await broker.take_device(kit.learner, 0)
    await sleeps(kit, "w", 1)
    await broker.release_lock(kit.learner)
    successor = await broker.acquire_lock("learner", "l2", TTL_MS)
    with pytest.raises(FencedError):
        await broker.return_device(kit.learner, 1)
    with pytest.raises(FencedError):
        await broker.take_device(kit.learner, 0)
    assert await broker.take_device(successor, 0) == DeviceClaim(1, ())
    assert await broker.return_device(successor, 1)


async def test_a_turn_that_redis_lost_is_made_up_for(kit: Kit) -> None:
    """Workers follow the highest turn they saw; the learner's next one is above it."""
    await kit.session("w")
    await sleeps(kit, "w", 7)
    await kit.broker.client.hset(kit.broker.keys.meta, "device_turn", "4")
    assert await kit.broker.take_device(kit.learner, 0) == DeviceClaim(7, ())
    assert await turn_of(kit) == 7
    await kit.broker.return_device(kit.learner, 7)
    assert await turn_of(kit) == 8


async def test_a_new_incarnation_gives_workers_time_to_open_sessions(kit: Kit) -> None:
    await kit.session("w")
    await kit.broker.begin_incarnation(kit.coordinator, "test")
    claim = await kit.broker.take_device(kit.learner, TTL_MS)
    assert claim.owed_by, "workers without a session may still be on the device"
    await kit.advance(TTL_MS)
    assert (await kit.broker.take_device(kit.learner, TTL_MS)).owed_by == ()


@dataclass
class World:
    """Learner lives and workers as they behave, moved at random; ``on_device`` is the truth."""

    kit: Kit
    random: random.Random
    views: dict[str, int] = field(default_factory=dict)
    awake: set[str] = field(default_factory=set)
    reported: dict[str, int] = field(default_factory=dict)
    holds: int = 0
    turns_held: int = 0
    lives: int = 1
    joined: int = 0

    async def join(self) -> None:
        """A new worker process: it has no engine until it has seen an even turn."""
        if len(self.views) < 4:
            name = f"w{self.joined}"
            self.joined += 1
            await self.kit.session(name)
            self.views[name], self.reported[name] = 0, 0

    async def worker_beats(self) -> None:
        """Heartbeat, and what follows from the turn; falling asleep takes until the next beat."""
        if not self.views:
            return
        name = self.random.choice(sorted(self.views))
        status = {"device_turn": self.views[name], "asleep_turn": self.reported[name]}
        poll = await self.kit.broker.heartbeat(name, TTL_MS, status)
        self.views[name] = max(self.views[name], poll.device_turn)
        if self.views[name] % 2:
            self.awake.discard(name)
            self.reported[name] = self.views[name]
        else:
            self.awake.add(name)
            self.reported[name] = 0

    async def worker_dies(self) -> None:
        """SIGKILL: its memory is free at once, its session a while later."""
        if len(self.views) > 1 and self.random.random() < 0.3:
            name = self.random.choice(sorted(self.views))
            self.awake.discard(name)
            del self.views[name], self.reported[name]
            await self.kit.expire_sessions(*self.views)

    async def learner_asks(self) -> None:
        """One look; with an answer that owes nothing it is on the device."""
        if not self.holds:
            claim = await self.kit.broker.take_device(self.kit.learner, 0)
            if not claim.owed_by:
                self.holds = claim.turn
                self.turns_held += 1

    async def learner_returns(self) -> None:
        """Off the device first, then the word."""
        if self.holds:
            turn, self.holds = self.holds, 0
            await self.kit.broker.return_device(self.kit.learner, turn)

    async def learner_dies(self) -> None:
        """A successor takes over, whatever the predecessor was doing."""
        if self.random.random() < 0.3:
            self.holds = 0
            self.lives += 1
            await self.kit.broker.release_lock(self.kit.learner)
            name = f"l{self.lives}"
            self.kit.learner = await self.kit.broker.acquire_lock("learner", name, TTL_MS)


@pytest.mark.parametrize("seed", range(6))
async def test_random_lives_never_meet_on_the_device_and_never_stop(kit: Kit, seed: int) -> None:
    world = World(kit, random.Random(seed))
    await world.join()
    moves = (
        *[world.worker_beats] * 6,
        *[world.learner_asks] * 4,
        world.learner_returns,
        world.learner_dies,
        world.worker_dies,
        world.join,
    )
    for _ in range(300):
        await world.random.choice(moves)()
        assert not (world.holds and world.awake), (world.holds, world.awake)
    assert world.turns_held >= 3
    # Fairly scheduled from here on, both sides get their turn.
    for _ in range(200):
        await world.worker_beats()
        await world.learner_asks()
    assert world.holds
    await world.learner_returns()
    for _ in range(200):
        await world.worker_beats()
    assert world.awake == set(world.views)
