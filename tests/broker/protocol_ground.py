"""Ground of the protocol state machine: the run, the clock, looking into the broker."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Coroutine
from typing import Any, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize

from ringasync.broker.client import Broker
from ringasync.broker.core import text
from ringasync.records.states import RolloutState
from tests.conftest import CONFIG_HASH

from .kit import Kit
from .protocol_model import Holding, Model, Records

T = TypeVar("T")


class ProtocolGround(RuleBasedStateMachine):
    """One machine: an event loop, a run of its own, and the model of what must be so."""

    url = ""
    """Of the server; set on a subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
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
        if mode == "rounds":
            await self.broker.open_round(self.kit.coordinator, "open0", 1)
            self.model.records.round_id, self.model.records.round_state = 1, "open"
        for number in range(3):
            self.model.sessions.append(await self.kit.session(f"first{number}"))
            await self.kit.feed(f"g0{number}", size=2)
            self.note_group(f"g0{number}", 2)

    def note_group(self, group_id: str, size: int) -> None:
        for number in range(size):
            self.model.records.lengths[f"{group_id}.{number}"] = 0
            self.model.records.retention[f"{group_id}.{number}"] = 0

    def teardown(self) -> None:
        if hasattr(self, "broker"):
            assert self.do(self.leaked()) == []
            self.do(self.broker.delete_run())
            self.do(self.broker.close())
        self.runner.close()

    def pick(self, which: int, *, void: bool) -> Holding | None:
        found = [holding for holding in self.model.holdings if holding.void is void]
        return found[which % len(found)] if found else None

    async def leaked(self) -> list[str]:
        """Payloads of rollouts that have ended or were journalled."""
        found = []
        async for raw in self.broker.client.scan_iter(match=self.broker.keys.segments("*")):
            rollout_id = text(raw).rsplit(":", 1)[1]
            state = await self.kit.state(rollout_id)
            if state not in set(RolloutState) or state == RolloutState.GRADE_ERROR:
                found.append(f"{rollout_id} {state}")
        return found

    def holders(self) -> dict[str, str]:
        """Who holds which rollout, by the leases the broker keeps for each session."""
        held: dict[str, str] = {}
        for session in self.model.sessions:
            key = self.broker.keys.leases(session)
            for member in self.do(self.members(key)):
                held[member] = session
        return held

    async def members(self, key: str) -> list[str]:
        return [text(member) for member in await self.broker.client.smembers(key)]

    def void_what_ended(self) -> None:
        """A move may have ended a group by its own rules (attempts, last verdict)."""
        for group_id in {h.lease.group_id for h in self.model.live()}:
            if self.do(self.kit.group_state(group_id)) != "open":
                self.model.void_group(group_id)
        for job, void in self.model.jobs:
            if not void and self.do(self.kit.group_state(job.group_id)) != "open":
                self.model.void_group(job.group_id)
