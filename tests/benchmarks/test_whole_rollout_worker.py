"""The variant without partials sends nothing of a rollout before its end, whatever versions come"""

from __future__ import annotations

from benchmarks.whole_rollout_worker import has_ended
from ringasync.broker.types import Lease
from workers.buffers import LocalRollout, RolloutStore
from workers.engines.base import EngineFinish, TokenChunk


def _chunk(version: int, finish: EngineFinish | None = None) -> TokenChunk:
    return TokenChunk("r", (5,) * 40, (-0.5,) * 40, version, finish)


def test_only_an_end_makes_a_rollout_due() -> None:
    store = RolloutStore()
    lease = Lease("r", "g", "1.1.x", "train", (1,), (), 0, 200, 0, 0, 0)
    rollout = LocalRollout(lease, (), 0)
    store.put(rollout)

    def due() -> tuple[bool, bool]:
        return bool(store.due(32, 3600.0)), has_ended(store, rollout, 32, 3600.0, 0.0)

    store.absorb([_chunk(1)])
    store.absorb([_chunk(2)])
    assert due() == (True, False)
    store.absorb([_chunk(2, "length")])
    assert due() == (True, True)
