"""Every Redis key of a run. All share the hash tag ``{RUN}``, so one cluster slot holds a run."""

from __future__ import annotations

import re

from ringasync.errors import ConfigError

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Keys:
    """Key names of one run; see ``docs/redis-cli.md`` for what each holds.

    Raises ``ConfigError`` for a run name that is not a plain name: braces would move the hash tag.
    """

    def __init__(self, run: str) -> None:
        if not _RUN_NAME.fullmatch(run):
            raise ConfigError(
                f"run name {run!r} must be 1 to 64 letters, digits, dots, dashes or underscores "
                "and begin with a letter or digit: set run.name"
            )
        self.run = run
        self.prefix = f"ring:{{{run}}}:"
        self.meta = self.prefix + "meta"
        self.clock = self.prefix + "clock"
        self.sim_now = self.prefix + "sim_now"
        self.tickets = self.prefix + "tickets"
        self.tickets_resume = self.prefix + "tickets:resume"
        self.tickets_eval = self.prefix + "tickets:eval"
        self.grading = self.prefix + "grading"
        self.live = self.prefix + "live"
        self.ready = self.prefix + "ready"
        self.sessions = self.prefix + "sessions"
        self.ledger = self.prefix + "ledger"
        self.pool = self.prefix + "pool"
        self.round = self.prefix + "round"
        self.batches = self.prefix + "batches"
        self.versions = self.prefix + "versions"
        self.manifests = self.prefix + "manifests"
        self.outcomes = self.prefix + "outcomes"
        self.metrics = self.prefix + "metrics"
        self.samples = self.prefix + "samples"
        self.ends = self.prefix + "ends"
        self.ended = self.prefix + "ended"

    def rollout(self, rollout_id: str) -> str:
        """Hash of plain strings: one rollout."""
        return f"{self.prefix}rollout:{rollout_id}"

    def segments(self, rollout_id: str) -> str:
        """List: the rollout's encoded segments."""
        return f"{self.prefix}seg:{rollout_id}"

    def history(self, rollout_id: str) -> str:
        """List of compact JSON: the rollout's transitions."""
        return f"{self.prefix}hist:{rollout_id}"

    def group(self, group_id: str) -> str:
        """Hash of plain strings: one group with its prompt."""
        return f"{self.prefix}group:{group_id}"

    def session(self, session_id: str) -> str:
        """Hash: one role's session, with its last status."""
        return f"{self.prefix}session:{session_id}"

    def leases(self, session_id: str) -> str:
        """Set: rollouts that a session holds, for generation or grading."""
        return f"{self.prefix}leases:{session_id}"

    def batch(self, batch_id: str) -> str:
        """Hash: one reserved, taken or trained batch."""
        return f"{self.prefix}batch:{batch_id}"

    def lock(self, role: str) -> str:
        """Hash: who holds a role, with the fencing token."""
        return f"{self.prefix}lock:{role}"
