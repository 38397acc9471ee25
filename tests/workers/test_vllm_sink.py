"""The token sink and the version differences, without vLLM: their inputs are plain objects."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ringasync.errors import EnvironmentRefusedError
from workers.engines.base import TokenChunk
from workers.engines.vllm import compat
from workers.engines.vllm.token_sink import TokenSink

STOP, LENGTH, ABORT, ERROR = 0, 1, 2, 3


def added(sink: TokenSink, ours: str, internal: str) -> None:
    """AsyncLLM announces a request."""
    sink.add_request(
        SimpleNamespace(request_id=internal, external_req_id=ours), None, None, 0, None
    )


def output(
    internal: str,
    tokens: Sequence[int] = (),
    logprobs: Sequence[float] = (),
    finish: int | None = None,
    **more: Any,
) -> Any:
    """One ``EngineCoreOutput`` as far as the sink reads it."""
    fields = {"new_prompt_logprobs_tensors": None, "prefill_stats": None} | more
    return SimpleNamespace(
        request_id=internal,
        new_token_ids=list(tokens),
        new_logprobs=SimpleNamespace(
            logprobs=np.array([[x] for x in logprobs], np.float32).reshape(-1, 1),
            cu_num_generated_tokens=None,
        ),
        finish_reason=finish,
        **fields,
    )


async def test_tokens_of_several_steps_become_one_chunk_a_request() -> None:
    sink = TokenSink(3)
    added(sink, "a", "a-1")
    added(sink, "b", "b-1")
    sink.process_outputs([output("a-1", [5], [-0.5]), output("b-1", [6], [-0.25])])
    sink.process_outputs([output("a-1", [7], [-1.0])], 0.0, None)
    assert sink.filled.is_set()
    assert sink.drain() == [
        TokenChunk("a", (5, 7), (-0.5, -1.0), 3),
        TokenChunk("b", (6,), (-0.25,), 3),
    ]
    assert sink.drain() == []
    assert not sink.filled.is_set()


async def test_a_quarter_of_a_flush_is_urgent_though_nothing_ended() -> None:
    sink = TokenSink(1, gather_tokens=3)
    added(sink, "a", "a-1")
    for step in range(3):
        assert not sink.urgent.is_set()
        sink.process_outputs([output("a-1", [step], [-1.0])])
        sink.update_scheduler_stats(None)
    assert sink.urgent.is_set()
    assert len(sink.drain()[0].token_ids) == 3
    assert not sink.urgent.is_set()


async def test_relabel_cuts_a_chunk_at_the_swap() -> None:
    sink = TokenSink(3)
    added(sink, "a", "a-1")
    sink.process_outputs([output("a-1", [1], [-1.0])])
    sink.relabel(4)
    sink.process_outputs([output("a-1", [2], [-2.0], LENGTH)])
    assert sink.urgent.is_set()
    assert sink.drain() == [
        TokenChunk("a", (1,), (-1.0,), 3),
        TokenChunk("a", (2,), (-2.0,), 4, "length"),
    ]


async def test_an_aborted_request_keeps_what_it_had_and_its_id_can_come_again() -> None:
    sink = TokenSink(1)
    added(sink, "a", "a-1")
    sink.process_outputs([output("a-1", [1], [-1.0])])
    assert sink.abort_requests(["a", "never heard of"]) == ["a-1"]
    added(sink, "a", "a-2")
    # The step that was under way still answers for the old one.
    sink.process_outputs([output("a-1", [9], [-9.0], ABORT), output("a-2", [2], [-2.0], STOP)])
    assert sink.drain() == [
        TokenChunk("a", (1,), (-1.0,), 1),
        TokenChunk("a", (2,), (-2.0,), 1, "stop"),
    ]
    assert not sink.has_unfinished_requests()


async def test_an_error_of_vllm_for_one_request_is_no_silence() -> None:
    sink = TokenSink(1)
    added(sink, "a", "a-1")
    sink.process_outputs([output("a-1", finish=ERROR)])
    assert sink.error is not None
    assert "a" in sink.error
    assert sink.filled.is_set()


async def test_other_labels_are_counted() -> None:
    sink = TokenSink(7)
    added(sink, "a", "a-1")
    sink.process_outputs([output("a-1", [1], [-1.0])], weight_version="7")
    assert sink.other_labels == 0
    sink.process_outputs([output("a-1", [1], [-1.0])], weight_version="6")
    assert sink.other_labels == 1


async def test_scores_are_the_rows_of_the_tokens_asked_for() -> None:
    sink = TokenSink(1)
    done = sink.want_score("s", 2, asyncio.get_running_loop())
    added(sink, "s", "s-1")
    rows = SimpleNamespace(
        logprobs=SimpleNamespace(numpy=lambda: np.array([[-1], [-2], [-3], [-4]], np.float32))
    )
    sink.process_outputs([output("s-1", [0], [0.0], LENGTH, new_prompt_logprobs_tensors=rows)])
    assert (await done).tolist() == [-3.0, -4.0]
    assert sink.drain() == []


async def test_a_dead_engine_wakes_who_waits_for_a_score() -> None:
    sink = TokenSink(1)
    done = sink.want_score("s", 0, asyncio.get_running_loop())
    sink.propagate_error(RuntimeError("EngineCore died"))
    with pytest.raises(asyncio.CancelledError):
        await done


async def test_a_barrier_is_met_behind_what_came_before() -> None:
    sink = TokenSink(1)
    marker, reached = sink.barrier()
    sink.update_scheduler_stats(None)
    assert not reached.is_set()
    sink.update_scheduler_stats(marker)
    assert reached.is_set()


async def test_prefix_cache_hits_are_added_up() -> None:
    sink = TokenSink(1)
    added(sink, "a", "a-1")
    stats = SimpleNamespace(num_prompt_tokens=40, num_cached_tokens=32)
    sink.process_outputs([output("a-1", [1], [-1.0], prefill_stats=stats)])
    assert (sink.prompt_tokens, sink.cached_prompt_tokens) == (40, 32)


# Versions.


class Engine26:
    """``finish_weight_update`` of vLLM 0.26."""

    finished = 0

    async def finish_weight_update(self) -> None:
        self.finished += 1


class Engine32(Engine26):
    """Since 0.32 it takes a label, and there is one for the weights of the start."""

    labels: tuple[str | None, ...] = ()

    async def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.labels = (*self.labels, weight_version)

    async def update_weight_version(self, new_version: str) -> None:
        self.labels = (*self.labels, new_version)


async def test_0_26_is_told_no_version() -> None:
    engine = Engine26()
    await compat.label_weights(engine, 4)
    await compat.finish_weight_update(engine, 5)
    assert engine.finished == 1


async def test_0_32_is_told_our_version() -> None:
    engine = Engine32()
    await compat.label_weights(engine, 4)
    await compat.finish_weight_update(engine, 5)
    assert engine.labels == ("4", "5")


@pytest.mark.parametrize(
    ("version", "answer"),
    [("0.26.0", ""), ("0.32.0", ""), ("0.33.1+cpu", ""), ("0.40.0", "newer"), ("1.0.0", "newer")],
)
def test_versions_in_and_above_the_tested_range(version: str, answer: str) -> None:
    assert answer in compat.check_version(version)
    assert bool(compat.check_version(version)) == bool(answer)


@pytest.mark.parametrize("version", ["0.19.1", "0.25.9", "junk", ""])
def test_versions_that_are_refused_with_the_remedy(version: str) -> None:
    with pytest.raises(EnvironmentRefusedError, match=r"install|upgrade"):
        compat.check_version(version)
