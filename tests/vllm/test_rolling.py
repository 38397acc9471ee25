"""``kv = "rolling"`` with a real vLLM: what follows a rollout's renewal is exact, others go on."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.vllm.kit import MAX_GAP_NATS, engine_kit, make_engine, reference
from tests.vllm.models import write_dense
from tests.workers.engine_kit import Collected, prompts, request
from workers.engine_control import EngineControl
from workers.engines.base import GenerationRequest, TokenChunk

pytestmark = pytest.mark.timeout(420)

LENGTH = 80
WAVE_TOKENS = 48


async def test_log_probs_are_exact_again_from_the_renewal_on(tmp_path: Path) -> None:
    folders = [write_dense(tmp_path / f"w{i}", seed=i, tied=False) for i in range(2)]
    engine = make_engine(kv="rolling")
    got: dict[str, Collected] = {}
    changed = asyncio.Event()
    submitted: list[GenerationRequest] = []
    generate = engine.generate

    async def noted(requests: Sequence[GenerationRequest]) -> None:
        submitted.extend(requests)
        await generate(requests)

    def take(chunks: Sequence[TokenChunk]) -> None:
        for one in chunks:
            got.setdefault(one.request_id, Collected()).take(one)
        changed.set()

    engine.generate = noted  # type: ignore[method-assign]
    control = EngineControl(lambda _: engine, take, changed, WAVE_TOKENS)
    # Siblings share a prompt, so that a renewed one finds the other's prefix in the cache.
    shared = prompts(engine_kit(folders), 6)
    requests = [request(f"r{i}", shared[i // 2 + 3], LENGTH) for i in range(6)]
    await control.start(folders[0], 1)
    await control.submit(requests)
    while len(got) < 6 or min(len(one.tokens) for one in got.values()) < 20:
        changed.clear()
        await changed.wait()
    await control.prepare(folders[1])
    await control.hold("weights")
    await control.load(folders[1], 2)
    await control.release("weights")
    while any(one.finish is None for one in got.values()):
        changed.clear()
        await changed.wait()
    assert control.failed is None
    await control.stop()

    again = {one.request_id: one for one in submitted[6:]}
    assert sorted(again) == sorted(got), "each was submitted again, once"
    assert len(submitted) == 12
    kept = 0
    for one in requests:
        seen = got[one.request_id]
        assert len(seen.tokens) == LENGTH
        first = len(again[one.request_id].prefix_ids)
        assert first >= seen.versions.count(1)
        kept += first - seen.versions.count(1)
        context = [*one.prompt_ids, *seen.tokens[:first]]
        expected = reference(folders[1], context, seen.tokens[first:])
        gap = np.abs(np.asarray(seen.logprobs[first:]) - expected)
        assert gap.max() < MAX_GAP_NATS
    assert kept > 0, "later waves sampled under the new weights while they waited"
