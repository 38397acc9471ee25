"""What a role answers to "how are you": `/healthz` and `/livez` beside its metrics.

::

    GET /livez     200 while the role's loop moves, else 503: for a restart
    GET /healthz   the same, and 503 too while Redis does not answer the role or something is
                   awaited too long: for people, alerts and readiness

The body of both is JSON: ``run role worker doing stalls heartbeat_age_s``. It is answered by a
thread of its own, so that a loop that hangs is seen from outside.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from ringasync.clock import monotonic_s


class Health:
    """The role's last words. Written by its loop, read by the threads of the answers."""

    def __init__(
        self,
        labels: Mapping[str, str],
        silent_after_s: float,
        clock: Callable[[], float] = monotonic_s,
    ) -> None:
        self._labels, self._silent_after_s, self._clock = dict(labels), silent_after_s, clock
        self._said: tuple[float, str, str] | None = None
        self._beat_s = 0.0

    def beat(self) -> None:
        """A sign of the role's loop itself, whatever Redis does."""
        self._beat_s = self._clock()

    def say(self, status: Mapping[str, object]) -> None:
        """Take over ``doing`` and ``stall`` of a status that goes to Redis."""
        self.beat()
        if "doing" in status:
            stall = status.get("stall")
            self._said = (
                self._clock(),
                str(status["doing"]),
                stall if isinstance(stall, str) else "",
            )

    def report(self) -> tuple[bool, dict[str, Any]]:
        """Whether the role's loop moves, and what it says. A role that only starts says nothing."""
        if self._said is None:
            return True, {**self._labels, "doing": "starting", "stalls": []}
        at_s, doing, stall = self._said
        age_s = self._clock() - at_s
        moves = self._clock() - self._beat_s < self._silent_after_s
        stalls = [stall] if stall else []
        if age_s >= self._silent_after_s:
            debtor = (
                "Redis, which does not answer this process"
                if moves
                else "this process: its loop hangs"
            )
            stalls.append(f"{age_s:.0f} s: a heartbeat; owed by {debtor}; its log says more")
        age = round(age_s, 1)
        return moves, {**self._labels, "doing": doing, "stalls": stalls, "heartbeat_age_s": age}

    def beside(self, application: WSGIApplication) -> WSGIApplication:
        """``application`` with the two paths in front of it."""

        def answer(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
            path = environ.get("PATH_INFO", "")
            if path not in ("/healthz", "/livez"):
                return application(environ, start)
            moves, said = self.report()
            well = moves if path == "/livez" else not said["stalls"]
            body = json.dumps(said).encode() + b"\n"
            headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
            start("200 OK" if well else "503 Service Unavailable", headers)
            return [body]

        return answer
