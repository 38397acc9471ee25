"""Sessions: a role's life as the broker sees it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, cast

from ringasync.broker.core import Arg, BrokerCore, pairs, text
from ringasync.broker.types import Poll
from ringasync.errors import BrokerRefusedError

_METRICS_KEEP_MS = 3_600_000
RoundState = Literal["none", "open", "closing", "training"]


class SessionMixin(BrokerCore):
    """Heartbeats, and the metrics that roles send beside them."""

    async def open_session(
        self, session_id: str, role: str, ttl_ms: int, info: Mapping[str, str]
    ) -> None:
        """Begin a session. Without a heartbeat for ``ttl_ms`` it is dead and its leases return.

        ``info`` describes it for ``top``; ``info["worker"]`` is the stable name of a worker that
        opens several sessions in its life.
        """
        await self._script("open_session", session_id, role, ttl_ms, *_flat(info))

    async def heartbeat(
        self, session_id: str, ttl_ms: int, status: Mapping[str, str | int | float]
    ) -> Poll:
        """Renew the session and read everything a role must notice, in one script."""
        reply = await self._script("heartbeat", session_id, ttl_ms, *_flat(status))
        return _poll(reply)

    async def close_session(self, session_id: str) -> None:
        """End the session; leases it still holds return at once, without raising attempts."""
        await self._script("close_session", session_id)

    async def sessions(self) -> list[dict[str, str]]:
        """Living sessions: ``id role state age_ms leases`` and what they told of themselves."""
        ids = await self._read(self._client.zrange(self.keys.sessions, 0, -1))
        now_ms = await self.now_ms()
        found = []
        for raw in ids:
            session_id = text(raw)
            async with self._client.pipeline(transaction=False) as pipe:
                pipe.hgetall(self.keys.session(session_id))
                pipe.scard(self.keys.leases(session_id))
                fields_reply, leases = await self._read(pipe.execute())
            fields = pairs(fields_reply)
            if not fields:
                continue
            age_ms = max(0, now_ms - int(fields.get("beat_ms", "0")))
            if age_ms > int(fields.get("ttl_ms", "0")):
                fields["state"] = "late"
            found.append({**fields, "id": session_id, "age_ms": str(age_ms), "leases": str(leases)})
        return sorted(found, key=lambda row: (row["role"], row["id"]))

    async def now_ms(self) -> int:
        """The broker's clock in milliseconds: never falls, simulated in simulation mode."""
        return int(await self._script("clock"))

    async def push_metrics(self, role: str, values: Mapping[str, Any]) -> bool:
        """Add one JSON entry to the metrics stream; False if Redis is full (nothing waits for it).

        Entries older than an hour are trimmed.
        """
        payload = json.dumps({"role": role, **values}, separators=(",", ":"))
        try:
            await self._script("push_metrics", payload, _METRICS_KEEP_MS)
        except BrokerRefusedError:
            return False
        return True

    async def read_metrics(self, after_id: str, count: int) -> list[tuple[str, dict[str, Any]]]:
        """Metrics entries after ``after_id`` ("0" from the beginning), oldest first."""
        first = "-" if after_id in ("", "0", "-") else f"({after_id}"
        rows = await self._read(self._client.xrange(self.keys.metrics, first, "+", count))
        return [(text(entry_id), json.loads(fields[b"json"])) for entry_id, fields in rows]


def _flat(fields: Mapping[str, str | int | float]) -> list[Arg]:
    flat: list[Arg] = []
    for name, value in fields.items():
        flat += [name, value if isinstance(value, str) else repr(value)]
    return flat


def _poll(reply: list[Any]) -> Poll:
    phase, paused, latest, pin, bad, round_id, state, incarnation, step, turn = (
        text(value) for value in reply[1:]
    )
    return Poll(
        alive=bool(reply[0]),
        phase=phase,
        paused=paused == "1",
        latest_version=int(latest or 0),
        pin_version=int(pin) if pin else None,
        bad_versions=tuple(int(version) for version in bad.split(",") if version),
        round_id=int(round_id or 0),
        round_state=cast(RoundState, state or "none"),
        incarnation=int(incarnation),
        learner_step=int(step or 0),
        device_turn=int(turn or 0),
    )
