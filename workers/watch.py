"""What a worker waits for, read from the status that it sends with each heartbeat."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ringasync.clock import monotonic_s
from ringasync.observability.stalls import Awaited, StallClock, together

Status = Mapping[str, str | int | float]

_SWAPS = ("taking up version", "loading version")
_RESTART = "end this worker: others go on with its rollouts, and `ringasync up` starts another"


class WorkerWatch:
    """Names a swap, a fetch or an engine that does not get on, once ``deadline_s`` have passed.

    A pure function of the statuses and the clock; it waits for nothing itself.
    """

    def __init__(self, deadline_s: float, clock: Callable[[], float] = monotonic_s) -> None:
        self._stalls = StallClock(deadline_s, clock)

    def watched(self, status: Callable[[], Status]) -> Callable[[], Status]:
        """``status`` with what is overdue as its ``stall``."""

        def told() -> Status:
            now = status()
            return {**now, "stall": self.look(now)}

        return told

    def look(self, status: Status) -> str:
        """What is overdue, in words; what the status says itself of that (a grader's) included."""
        return together((str(status.get("stall", "")), self._stalls.look(dict(_awaited(status)))))


def _awaited(status: Status) -> list[tuple[str, Awaited]]:
    doing = str(status["doing"])
    found = []
    if doing.startswith(_SWAPS):
        what = f"a weight swap ({doing})"
        found.append(("swap", Awaited(what, "the inference engine", _RESTART, doing)))
    if fetching := status.get("fetching_version"):
        what = f"the files of version {fetching}"
        remedy = "look at the disk or network that weights.transport uses, then " + _RESTART
        found.append(("fetch", Awaited(what, "the weight transport", remedy, fetching)))
    if status["active"] and "paused" not in doing and doing.startswith("generating"):
        what = f"tokens of {status['active']} active rollouts: this worker generates nothing"
        sign = (status["tokens_generated"], status.get("swaps"))
        found.append(("tokens", Awaited(what, "the inference engine", _RESTART, sign)))
    return found
