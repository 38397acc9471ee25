"""The run itself: creation, joining, phase, role locks, incarnations."""

from __future__ import annotations

import json
import secrets
from typing import Any

from ringasync import SCHEMA_VERSION
from ringasync.broker.core import BrokerCore, fence_args, join_refusal, new_nonce
from ringasync.broker.types import Fence
from ringasync.errors import JoinRefusedError
from ringasync.records.states import Phase

_DELETE_BATCH = 512


class RunMixin(BrokerCore):
    """What concerns the run as a whole."""

    async def create_run(self, config_json: str, config_hash: str, mode: str = "pipelined") -> bool:
        """Create the run; True if it is new, False if it exists with the same configuration.

        ``mode`` is ``pipelined`` or ``rounds``: in the second, train tickets are given only while
        a round is open. Raises ``JoinRefusedError`` when schema or configuration hash differ.
        """
        config = _section(json.loads(config_json) if config_json else {})
        schedule, run = _section(config.get("schedule")), _section(config.get("run"))
        fields: list[str] = []
        for name, value in {
            "config": config_json,
            "mode": mode,
            "seed": run.get("seed", 0),
            "breaker": schedule.get("quarantine_breaker", 0.5),
            "max_attempts": schedule.get("max_attempts", 5),
            "incarnation": 1,
            "phase": Phase.RUNNING.value,
            "paused": 0,
            "latest_version": 0,
            "learner_step": 0,
            "fork_step": 0,
            "pin_version": "",
            "bad_versions": "",
            "publication_blocked": "",
            "paused_feeding": "",
            "round_id": 0,
            "round_state": "none",
            "cursor": "",
            "server_run_id": await self._server_run_id(),
        }.items():
            fields += [name, str(value)]
        reply = await self._script("create_run", config_hash, str(SCHEMA_VERSION), *fields)
        self._run_seen = True
        if int(reply) == 1:
            self._accepted_seen = 0
        return int(reply) == 1

    async def join_run(self, config_hash: str) -> None:
        """Check that this role may take part.

        Raises ``RingError`` when the run does not exist (yet) and ``JoinRefusedError`` when its
        schema or configuration is another.
        """
        meta = await self.run_meta()
        if meta["schema"] != str(SCHEMA_VERSION):
            raise JoinRefusedError(
                join_refusal(self.run, "schema", meta["schema"], str(SCHEMA_VERSION))
            )
        if meta["config_hash"] != config_hash:
            raise JoinRefusedError(
                join_refusal(self.run, "configuration", meta["config_hash"], config_hash)
            )

    async def run_meta(self) -> dict[str, str]:
        """The run's plain fields. Raises ``RingError`` when it does not exist."""
        meta = await self._hash(self.keys.meta)
        if "schema" not in meta:
            raise self._no_run()
        self._run_seen = True
        return meta

    async def set_phase(self, fence: Fence, phase: Phase | str) -> None:
        """Set the run's phase; ``done`` lets every role exit."""
        await self._script("set_meta", *fence_args(fence), "phase", str(Phase(phase)))

    async def set_paused(self, paused: bool, why: str = "") -> None:
        """Pause or resume the run by hand.

        Resuming also resets the quarantine breaker and lifts the block that bad versions set on
        publication; the versions themselves stay bad.
        """
        fields = ["paused", "1" if paused else "0", "paused_why", why]
        if not paused:
            fields += ["paused_feeding", "", "publication_blocked", ""]
        await self._script("set_meta", "", "", *fields)
        if not paused:
            await self._read(self._client.delete(self.keys.ends))

    async def delete_run(self) -> int:
        """Delete every key of the run; returns how many."""
        deleted, batch = 0, []
        self._accepted_seen, self._run_seen = 0, False
        async for key in self._client.scan_iter(match=self.keys.prefix + "*", count=1000):
            batch.append(key)
            if len(batch) >= _DELETE_BATCH:
                deleted += int(await self._read(self._client.unlink(*batch)))
                batch = []
        if batch:
            deleted += int(await self._read(self._client.unlink(*batch)))
        return deleted

    # Role locks

    async def acquire_lock(self, role: str, owner: str, ttl_ms: int) -> Fence:
        """Take a role, alone. The token rises strictly, also across a Redis rollback.

        Raises ``LockHeldError`` while another process holds it.
        """
        jump = 1000 + secrets.randbelow(9000)
        token = await self._script(
            "acquire_lock", role, owner, new_nonce(), ttl_ms, await self._server_run_id(), jump
        )
        return Fence(role, owner, int(token))

    async def renew_lock(self, fence: Fence, ttl_ms: int) -> None:
        """Keep the role. Raises ``FencedError`` once another process took it."""
        await self._script("renew_lock", *fence_args(fence), ttl_ms)

    async def release_lock(self, fence: Fence) -> None:
        """Give the role up; nothing happens if it was lost before."""
        await self._script("release_lock", *fence_args(fence))

    # Incarnations

    async def check_incarnation(self, fence: Fence) -> int | None:
        """Begin a new incarnation if Redis is another process than before; returns its number.

        Compares the server's run id with the run's. A restart, a failover and a restored
        snapshot all change it; each may have lost the tail of what was accepted.
        """
        meta = await self.run_meta()
        current = await self._server_run_id()
        if meta.get("server_run_id") == current:
            return None
        return await self.begin_incarnation(fence, "Redis restarted or failed over")

    async def begin_incarnation(self, fence: Fence, reason: str) -> int:
        """Void all leases and sessions and rebuild the work streams; returns the new number.

        leased becomes parked or queued, grading becomes finished. Tokens that this client saw
        accepted earlier and that are gone now are booked as accepted and ``lost``.
        """
        reply = await self._script(
            "begin_incarnation",
            *fence_args(fence),
            reason,
            await self._server_run_id(),
            self._accepted_seen,
        )
        return int(reply)

    async def _server_run_id(self) -> str:
        info: dict[str, Any] = await self._read(self._client.info("server"))
        return str(info.get("run_id", ""))


def _section(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
