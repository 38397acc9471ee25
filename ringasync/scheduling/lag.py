"""What the gate is charged with besides open tokens: overtaking, and weights not taken up yet."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class OvertakingTracker:
    """Tokens trained beyond the weights under which the oldest unfinished group began.

    Only groups admitted in this life of the coordinator are known; what was admitted before is
    not counted, which admits too much rather than too little for the length of one generation.
    """

    def __init__(self) -> None:
        self._admitted: OrderedDict[str, int] = OrderedDict()

    def admitted(self, group_ids: Iterable[str], loaded_tokens: int) -> None:
        """Fed when the slowest worker's weights were made of ``loaded_tokens`` trained tokens."""
        for group_id in group_ids:
            self._admitted[group_id] = loaded_tokens

    def complete(self, group_id: str) -> None:
        """The group is complete or ended: nothing can overtake it any more."""
        self._admitted.pop(group_id, None)

    def clear(self) -> None:
        """Forget all, e.g. when Redis lost its tail."""
        self._admitted.clear()

    @property
    def oldest(self) -> str | None:
        """The oldest unfinished group that is known."""
        return next(iter(self._admitted), None)

    def overtaken_tokens(self, trained_tokens: int) -> int:
        """Tokens trained since then; 0 when no group is unfinished."""
        oldest = self.oldest
        return 0 if oldest is None else max(0, trained_tokens - self._admitted[oldest])


class VersionLag:
    """Tokens trained into versions that the slowest worker has not loaded.

    They count for ``lapse_s`` after the last change only, unless a version is pinned: a worker
    that cannot load new weights must not keep the gate shut.
    """

    def __init__(self, lapse_s: float = 10.0) -> None:
        self._lapse_s = lapse_s
        self._trained_at: dict[int, int] = {}
        self._last: tuple[int, int] | None = None
        self._changed_s = 0.0

    def unloaded_tokens(
        self,
        *,
        trained_tokens: int,
        latest_version: int,
        worker_versions: Sequence[int],
        pinned: bool,
        now_s: float,
    ) -> int:
        """Take note of the present state and answer. Version 0, nothing loaded, is not counted."""
        self._trained_at.setdefault(latest_version, trained_tokens)
        if self._last != (trained_tokens, latest_version):
            self._last, self._changed_s = (trained_tokens, latest_version), now_s
        loaded = min((v for v in worker_versions if v > 0), default=latest_version)
        known = [version for version in self._trained_at if version <= loaded]
        if not known:
            return 0
        base = max(known)
        for version in [v for v in self._trained_at if v < base]:
            del self._trained_at[version]
        if not pinned and now_s - self._changed_s > self._lapse_s:
            return 0
        return max(0, trained_tokens - self._trained_at[base])
