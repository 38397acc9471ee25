"""What must hold after every step of a simulated run, seen from the wire."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgpack

from learner.journal import JournalReader
from ringasync.broker.core import text

from .wire import Life, Step, Wire

AUDITED = {
    "begin_incarnation", "commit", "force_taken", "grade_many", "mark_trained", "park_many",
    "purge", "quarantine_many", "reap", "release", "reserve",
}  # fmt: skip
"""Scripts after which the whole ledger is recomputed."""
AUDIT_EVERY = 100


class ViolationError(AssertionError):
    """Something that must always hold did not."""


class Watch:
    """Reads along. What it remembers is what nobody may be given twice."""

    def __init__(self, wire: Wire, journal: Path, run: str, gate_tokens: float) -> None:
        self._wire, self._journal, self._run = wire, journal, run
        self._gate_tokens = gate_tokens
        self.leases: dict[tuple[str, str], tuple[str, str]] = {}
        """Rollout and lease token -> session and nonce of the call that was given it."""
        self.holder: dict[str, str] = {}
        self.lengths: dict[str, int] = {}
        self.fences: dict[tuple[str, int], str] = {}
        self.versions: dict[int, tuple[str, int]] = {}
        """Version -> manifest and learner step."""
        self.accepted_tokens = 0
        self.lost_tokens = 0
        self.rollbacks = 0
        wire.on_command, wire.on_rollback = self.command, self.rolled_back

    def command(self, step: Step, life: Life) -> None:
        """Look at one command and its answer."""
        look = getattr(self, f"_{step.what}", None)
        if look is not None:
            look(step.args, step.reply)
        if step.what in AUDITED or step.number % AUDIT_EVERY == 0:
            self.audit()

    def rolled_back(self) -> None:
        """Redis forgot who holds what and how long it is; that no token comes twice stays."""
        self.rollbacks += 1
        self.holder.clear()
        self.lengths.clear()
        accepted = int(self._wire.server.hget(self._wire.keys.ledger, "accepted") or 0)
        self.lost_tokens += self.accepted_tokens - accepted
        self.accepted_tokens = accepted

    def audit(self) -> None:
        """The ledger balances."""
        view = json.loads(self._wire.peek("audit"))
        counters = view["counters"] or {}
        live = {name: counters.get(name, 0) for name in view["recomputed"]}
        accepted = counters.pop("accepted", 0)
        self.accepted_tokens = max(self.accepted_tokens, accepted)
        total = sum(counters.values())
        require(live == view["recomputed"], f"ledger {live}, records say {view['recomputed']}")
        require(total == accepted, f"accounts add up to {total}, accepted are {accepted}")
        require(not view["problems"], f"broken links: {view['problems']}")

    # One method a script.

    def _take(self, args: tuple[Any, ...], reply: Any) -> None:
        for row in rows_of(reply):
            rollout, length = text(row[0]), int(row[7])
            self._leased(text(row[2]), rollout, (str(args[0]), str(args[3])))
            known = self.lengths.setdefault(rollout, length)
            require(known == length, f"{rollout} had {known} tokens and is leased with {length}")
            self.holder[rollout] = text(row[2])

    def _take_grading(self, args: tuple[Any, ...], reply: Any) -> None:
        for row in rows_of(reply):
            self._leased(text(row[2]), text(row[0]), (str(args[0]), str(args[2])))

    def _leased(self, token: str, rollout: str, caller: tuple[str, str]) -> None:
        """Tokens of one call differ by rollout; only a repeat of the call is given them again."""
        before = self.leases.setdefault((rollout, token), caller)
        require(
            before == caller,
            f"lease token {token} of {rollout}, given to {before}, was given to {caller} too",
        )

    def _append_many(self, args: tuple[Any, ...], reply: Any) -> None:
        items = msgpack.unpackb(args[0])
        count = len(items) // 7
        statuses = [text(s) for s in reply] if reply else ["ok"] * count
        for i, status in enumerate(statuses):
            rollout, token, start, stop = items[7 * i : 7 * i + 4]
            if status != "ok":
                continue
            holder = self.holder.setdefault(rollout, token)
            require(token == holder, f"{rollout}: append under {token}, held under {holder}")
            known = self.lengths.setdefault(rollout, int(start))
            require(known == int(start), f"{rollout}: append at {start} behind {known} tokens")
            self.lengths[rollout] = int(stop)
            self.accepted_tokens += int(items[7 * i + 5])

    def _begin_incarnation(self, _args: tuple[Any, ...], reply: Any) -> None:
        if not isinstance(reply, int):
            return  # it was refused
        self.holder = dict.fromkeys(self.holder, "nobody: a new incarnation began")

    def _commit(self, args: tuple[Any, ...], reply: Any) -> None:
        batch = str(args[2])
        if reply == 1:
            entries = JournalReader.look(self._journal, self._run).entries
            known = [entry.batch_id for entry in entries]
            require(batch in known, f"batch {batch} is committed and not in the journal")

    def _publish(self, args: tuple[Any, ...], reply: Any) -> None:
        if reply != 1:
            return
        version, step, manifest = int(args[2]), int(args[3]), str(args[5])
        before = self.versions.setdefault(version, (manifest, step))
        require(before[0] == manifest, f"version {version} is published twice")
        newest = max(self.versions)
        require(version == newest, f"version {version} is published after {newest}")

    def _acquire_lock(self, args: tuple[Any, ...], reply: Any) -> None:
        if not isinstance(reply, int):
            return
        role, nonce = str(args[0]), str(args[2])
        before = self.fences.setdefault((role, reply), nonce)
        require(before == nonce, f"{role}: fencing token {reply} is given out twice")
        newest = max(token for name, token in self.fences if name == role)
        require(reply == newest, f"{role}: fencing token {reply} is given out after {newest}")

    def _feed(self, args: tuple[Any, ...], reply: Any) -> None:
        if int(args[4]) == 0 or not isinstance(reply, int | bytes):
            return
        hold = self._wire.server.hmget(self._wire.keys.ledger, "finished", "graded", "taken")
        known = sum(int(tokens or 0) for tokens in hold)
        require(
            known <= self._gate_tokens,
            f"fed while {known} finished tokens wait to be trained; the gate holds "
            f"{self._gate_tokens:g}",
        )


def rows_of(reply: Any) -> list[Any]:
    """Rows of a script's answer; none when it refused."""
    if not isinstance(reply, list) or (reply and isinstance(reply[0], bytes)):
        return []
    return reply


def require(holds: bool, what: str) -> None:
    """Raise ``ViolationError`` unless ``holds``."""
    if not holds:
        raise ViolationError(what)
