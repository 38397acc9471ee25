"""Routed experts from vLLM's answers to segments: every token keeps the row that sampled it."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest

from ringasync.broker.types import Lease
from ringasync.errors import EngineError, SchemaError
from ringasync.records.routing import RoutedRows
from ringasync.records.segment import decode_segment
from workers.buffers import LocalRollout, local_rollout
from workers.engines.base import TokenChunk
from workers.engines.vllm.packing import StepRows, pack
from workers.engines.vllm.routed_experts import RoutedShape
from workers.engines.vllm.token_sink import TokenSink

from .test_vllm_packing import Lists
from .test_vllm_sink import added, output

SHAPE = RoutedShape(layers=2, experts_per_token=2, num_experts=8)


def position(*numbers: int) -> RoutedRows:
    """Rows of input positions; which one it is can be read off."""
    return np.asarray([[[i, i + 1], [i + 1, i]] for i in numbers], np.uint8)


def positions(rows: RoutedRows | None) -> list[int]:
    assert rows is not None
    found: list[int] = rows[:, 0, 0].tolist()
    return found


def sink(version: int = 1, shape: RoutedShape = SHAPE) -> TokenSink:
    made = TokenSink(version)
    made.routed_shape = shape
    added(made, "a", "a-1")
    return made


def step(token: int, routed: Any, finish: int | None = None) -> Any:
    return output("a-1", [token], [-float(token)], finish, routed_experts=routed)


async def test_context_rows_come_once_and_every_token_has_the_row_before_it() -> None:
    of = sink()  # a context of three tokens: positions 0, 1, 2
    of.process_outputs([step(5, position(0, 1, 2))])
    of.process_outputs([step(6, position(3))])
    (first,) = of.drain()
    of.process_outputs([step(7, position(4), 1)])
    (second,) = of.drain()
    assert first.token_ids == (5, 6)
    assert positions(first.routed_experts) == [0, 1, 2, 3]
    assert (second.token_ids, second.finish) == ((7,), "length")
    assert positions(second.routed_experts) == [4]


async def test_rows_stay_with_the_version_that_sampled() -> None:
    of = sink(version=3)
    of.process_outputs([step(5, position(0, 1))])
    of.relabel(4)
    of.process_outputs([step(6, position(2))])  # the context was recomputed: its rows do not come
    old, new = of.drain()
    assert (old.policy_version, positions(old.routed_experts)) == (3, [0, 1])
    assert (new.policy_version, positions(new.routed_experts)) == (4, [2])


async def test_later_rows_of_the_context_are_dropped() -> None:
    of = sink()
    of.process_outputs([step(5, position(0, 1))])
    of.process_outputs([step(6, position(0, 1, 2))])
    (chunk,) = of.drain()
    assert positions(chunk.routed_experts) == [0, 1, 2]


async def test_what_vllm_does_not_give_is_unknown() -> None:
    of = sink()
    of.process_outputs([step(5, np.concatenate([np.zeros((1, 2, 2), np.uint8), position(1)]))])
    of.process_outputs([step(6, None)])
    of.process_outputs([output("a-1", [7, 8], [-7.0, -8.0], routed_experts=position(4))])
    (chunk,) = of.drain()
    assert positions(chunk.routed_experts) == [255, 1, 255, 255, 4]


async def test_expert_255_of_256_is_a_choice() -> None:
    of = sink(shape=RoutedShape(1, 2, 256))
    of.process_outputs([step(5, np.asarray([[[255, 3]]], np.uint8))])
    (chunk,) = of.drain()
    assert chunk.routed_experts is not None
    assert chunk.routed_experts.dtype == np.uint16
    assert chunk.routed_experts.tolist() == [[[255, 3]]]


async def test_rows_outlive_the_message_they_came_in() -> None:
    of, message = sink(), position(0)
    of.process_outputs([step(5, message)])
    message[:] = 9
    assert positions(of.drain()[0].routed_experts) == [0]


async def test_rows_of_another_model_are_an_error() -> None:
    with pytest.raises(EngineError, match="the model has 2 layers and 2 experts a token"):
        sink().process_outputs([step(5, np.zeros((1, 3, 2), np.uint8))])


async def test_engines_not_asked_give_none() -> None:
    of = TokenSink(1)
    added(of, "a", "a-1")
    of.process_outputs([step(5, position(0))])
    assert of.drain()[0].routed_experts is None


async def test_an_aborted_request_leaves_its_rows_and_its_name_begins_anew() -> None:
    of = sink()
    of.process_outputs([step(5, position(0, 1))])
    of.abort_requests(["a"])
    added(of, "a", "a-2")
    of.process_outputs([output("a-2", [9], [-9.0], routed_experts=position(2, 3))])
    assert [positions(chunk.routed_experts) for chunk in of.drain()] == [[0, 1], [2, 3]]


async def test_packed_logprobs_and_rows_travel_together() -> None:
    of = sink()
    added(of, "b", "b-1")
    none = np.zeros(0, np.int32)
    rows = StepRows(Lists(none, np.asarray([[-1.0], [-2.0]], np.float32), none))
    outputs = [
        output("a-1", [5], routed_experts=position(0)),
        output("b-1", [6], routed_experts=position(1)),
    ]
    for index, one in enumerate(outputs):
        one.new_logprobs = rows.slice_request(index, 1)
    pack(outputs, Lists)
    of.process_outputs(outputs[:1])
    of.process_outputs(outputs[1:])
    first, second = of.drain()
    assert (first.behavior_logprobs, positions(first.routed_experts)) == ((-1.0,), [0])
    assert (second.behavior_logprobs, positions(second.routed_experts)) == ((-2.0,), [1])


# In the worker's buffers.


def rollout(*segments: bytes, kind: Literal["train", "eval"] = "train") -> LocalRollout:
    lease = Lease("g.0", "g", "1.1.x", kind, (1, 2, 3), segments, 0, 10, 3, 0, 0)
    return local_rollout(lease, [decode_segment(one) for one in segments])


def chunk(version: int, tokens: Sequence[int], routed: RoutedRows | None) -> TokenChunk:
    return TokenChunk("g.0", tuple(tokens), (-1.0,) * len(tokens), version, None, routed)


def cut(of: LocalRollout) -> bytes:
    item = of.cut(None)
    assert item is not None
    of.acknowledge(0.0)
    return item.payload


def test_segments_carry_the_rows_of_their_tokens() -> None:
    of = rollout()
    of.add(chunk(1, [5], position(0, 1, 2)), 0.0)
    of.add(chunk(1, [6], position(3)), 0.0)
    of.add(chunk(2, [7], position(4)), 0.0)
    assert [positions(decode_segment(cut(of)).routed_experts) for _ in range(2)] == [
        [0, 1, 2, 3],
        [4],
    ]


def test_a_resumed_rollout_goes_on_where_the_rows_ended() -> None:
    first = rollout()
    first.add(chunk(1, [5, 6], position(0, 1, 2, 3)), 0.0)
    resumed = rollout(cut(first))
    resumed.add(chunk(2, [7], position(1, 2, 3, 4)), 0.0)  # an engine that gives its context
    assert positions(decode_segment(cut(resumed)).routed_experts) == [4]


def test_dropping_a_version_drops_its_rows() -> None:
    of = rollout()
    of.add(chunk(1, [5], position(0, 1, 2)), 0.0)
    of.add(chunk(2, [6], position(3)), 0.0)
    assert of.drop_version(2) == 1
    assert positions(decode_segment(cut(of)).routed_experts) == [0, 1, 2]
    assert of.cut(None) is None


def test_rollouts_of_an_evaluation_carry_none() -> None:
    of = rollout(kind="eval")
    of.add(chunk(1, [5], position(0, 1, 2)), 0.0)
    assert decode_segment(cut(of)).routed_experts is None


def test_chunks_without_rows_between_others_are_unknown() -> None:
    of = rollout()
    of.add(chunk(1, [5], position(0, 1, 2)), 0.0)
    of.add(chunk(1, [6, 7], None), 0.0)
    assert positions(decode_segment(cut(of)).routed_experts) == [0, 1, 2, 255, 255]


def test_rows_of_another_model_quarantine() -> None:
    of = rollout()
    of.add(chunk(1, [5], position(2)), 0.0)
    of.add(chunk(1, [6], np.zeros((1, 3, 2), np.uint8)), 0.0)
    with pytest.raises(SchemaError, match="routed experts change"):
        of.cut(None)


def test_shape_of_a_model_comes_from_its_configuration() -> None:
    from workers.engines.vllm import compat

    text = SimpleNamespace(num_hidden_layers=48, num_experts_per_tok=8, num_experts=128)
    model = SimpleNamespace(hf_text_config=text)
    assert compat.routed_shape(model) == RoutedShape(48, 8, 128)
