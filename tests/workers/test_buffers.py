"""Local rollouts: what is cut, held, repeated and dropped, over any order of events."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringasync.broker.types import Lease
from ringasync.errors import SchemaError
from ringasync.records.segment import decode_segment, encode_segment, policy_segment
from ringasync.records.states import FinishReason
from workers.buffers import LocalRollout, RolloutStore, local_rollout
from workers.engines.base import EngineFinish, TokenChunk
from workers.intake import ModelLimits, sort_leases

LIMITS = ModelLimits(window_tokens=20, eos_token_ids=(0,), vocab_size=50)


def lease(*segments: bytes, prompt: tuple[int, ...] = (1, 2), max_new: int = 10) -> Lease:
    """A lease with these segments."""
    return Lease(
        rollout_id="g.0",
        group_id="g",
        token="1.1.x",
        kind="train",
        prompt_ids=prompt,
        segments=segments,
        num_tokens=0,
        max_new_tokens=max_new,
        seed=3,
        retention=0,
        attempts=0,
    )


def segment(start: int, version: int, *tokens: int) -> bytes:
    """An encoded segment."""
    return encode_segment(policy_segment(start, version, tokens, [-1.0] * len(tokens)))


def chunk(version: int, *tokens: int, finish: EngineFinish | None = None) -> TokenChunk:
    """Tokens of the only rollout; log-prob of token t is -t."""
    return TokenChunk("g.0", tokens, tuple(-float(token) for token in tokens), version, finish)


@pytest.fixture
def rollout() -> LocalRollout:
    return local_rollout(lease(), [])


def test_a_segment_never_mixes_versions(rollout: LocalRollout) -> None:
    for each in (chunk(3, 1, 2), chunk(3, 3), chunk(4, 4)):
        rollout.add(each, 0.0)
    first = rollout.cut(None)
    assert first is not None
    assert (first.start, first.length, first.policy_version) == (0, 3, 3)
    decoded = decode_segment(first.payload)
    assert decoded.token_ids.tolist() == [1, 2, 3]
    assert decoded.behavior_logprobs.tolist() == [-1.0, -2.0, -3.0]
    rollout.acknowledge(0.0)
    second = rollout.cut(None)
    assert second is not None
    assert (second.start, second.length, second.policy_version) == (3, 1, 4)


def test_what_was_sent_once_is_repeated_as_it_was(rollout: LocalRollout) -> None:
    """An answer may be lost: a longer repeat would look like a duplicate and lose its end."""
    rollout.add(chunk(3, 1, 2), 0.0)
    sent = rollout.cut(None)
    rollout.add(chunk(3, 3), 0.0)
    assert rollout.cut(None) is sent
    assert rollout.unsent_tokens == 3
    rollout.acknowledge(0.0)
    assert rollout.length == 2
    rest = rollout.cut(None)
    assert rest is not None
    assert (rest.start, rest.length) == (2, 1)


def test_tokens_of_the_version_on_trial_stay_behind(rollout: LocalRollout) -> None:
    rollout.add(chunk(3, 1, 2), 0.0)
    rollout.add(chunk(4, 3, 4, 5, finish="length"), 0.0)
    assert rollout.sendable_tokens(4) == 2
    assert rollout.held_tokens(4) == 3
    rollout.cut(4)
    rollout.acknowledge(0.0)
    assert rollout.cut(4) is None
    assert not rollout.is_settled
    assert rollout.drop_version(4) == 3
    assert rollout.finish is None
    rollout.leaving = "a test"
    assert rollout.is_settled


def test_a_passed_trial_lets_the_end_through(rollout: LocalRollout) -> None:
    rollout.add(chunk(4, 3, finish="stop"), 0.0)
    assert rollout.cut(4) is None
    assert rollout.cut(None) is not None
    rollout.acknowledge(0.0)
    assert rollout.is_settled
    assert rollout.finish is FinishReason.STOP


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("tokens"), st.integers(1, 4), st.booleans()),
            st.tuples(st.just("send"), st.just(0), st.booleans()),
        ),
        max_size=40,
    )
)
def test_every_token_is_sent_once_in_order(events: list[tuple[str, int, bool]]) -> None:
    """Whatever order of sampling, sending, lost answers and swaps."""
    rollout = local_rollout(lease(), [])
    sampled: list[tuple[int, int]] = []
    stored: list[tuple[int, int]] = []
    version = 1

    def send(answer_arrives: bool) -> None:
        item = rollout.cut(None)
        if item is None:
            return
        segment = decode_segment(item.payload)
        if item.start + item.length > len(stored):  # the broker's rule for a duplicate
            assert item.start == len(stored)
            stored.extend((int(token), item.policy_version) for token in segment.token_ids)
        if answer_arrives:
            rollout.acknowledge(0.0)

    for kind, count, flag in events:
        if kind == "tokens":
            version += flag
            tokens = range(len(sampled) + 1, len(sampled) + 1 + count)
            rollout.add(chunk(version, *tokens), 0.0)
            sampled.extend((token, version) for token in tokens)
        else:
            send(flag)
        assert rollout.length + rollout.unsent_tokens == len(sampled)
    while rollout.unsent_tokens:
        send(True)
    assert stored == sampled


def test_due_by_size_by_age_by_end_and_by_swap() -> None:
    now = [0.0]
    store = RolloutStore(lambda: now[0])
    store.put(local_rollout(lease(), []))

    def is_due() -> bool:
        return bool(store.due(4, 1.0))

    store.absorb([chunk(3, 1, 2)])
    assert not is_due()
    now[0] = 1.5
    assert is_due()
    now[0] = 0.5
    store.absorb([chunk(3, 3, 4)])
    assert is_due()
    for one in store:
        one.cut(None)
        one.acknowledge(now[0])
    store.absorb([chunk(3, 5)])
    assert not is_due()
    store.absorb([chunk(4, 6)])
    assert is_due()
    for one in store:
        one.cut(None)
        one.acknowledge(now[0])
    assert not is_due()
    store.absorb([chunk(4, finish="length")])
    assert is_due()


def test_tokens_of_rollouts_that_are_gone_or_leaving_are_dropped() -> None:
    store = RolloutStore()
    rollout = local_rollout(lease(), [])
    store.put(rollout)
    rollout.leaving = "a test"
    assert store.absorb([chunk(3, 1)]) == 0
    store.remove("g.0")
    assert store.absorb([chunk(3, 1)]) == 0
    assert store.active == 0


def test_a_nan_logprob_is_refused_when_it_is_cut(rollout: LocalRollout) -> None:
    rollout.add(TokenChunk("g.0", (1,), (float("nan"),), 3), 0.0)
    with pytest.raises(SchemaError, match="NaN"):
        rollout.cut(None)


def test_a_request_goes_on_after_the_prefix() -> None:
    intake = sort_leases([lease(segment(0, 3, 5, 6), segment(2, 4, 7))], LIMITS)
    (rollout,) = intake.generate
    request = rollout.request(LIMITS.window_tokens)
    assert request.prompt_ids == (1, 2)
    assert request.prefix_ids == (5, 6, 7)
    assert request.max_new_tokens == 7
    assert rollout.length == 3


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (lease(segment(0, 3, 5, 0)), FinishReason.STOP),
        (lease(segment(0, 3, *range(1, 11))), FinishReason.LENGTH),
        (lease(segment(0, 3, *range(1, 8)), prompt=(1,) * 13), FinishReason.LENGTH),
    ],
    ids=["eos", "max_new_tokens", "window"],
)
def test_a_whole_response_is_done(given: Lease, expected: FinishReason) -> None:
    intake = sort_leases([given], LIMITS)
    assert not intake.generate
    assert [rollout.finish for rollout in intake.done] == [expected]
    assert intake.done[0].is_settled


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (lease(prompt=()), "empty"),
        (lease(prompt=(1,) * 20), "window of 20"),
        (lease(prompt=(50,)), "outside the vocabulary"),
        (lease(prompt=(-1,)), "outside the vocabulary"),
        (lease(b"nonsense"), "cannot be read"),
        (lease(segment(3, 3, 5)), "cannot be read"),
        (lease(segment(0, 4, 5), segment(1, 3, 5)), "cannot be read"),
    ],
)
def test_poison_is_named(given: Lease, reason: str) -> None:
    intake = sort_leases([given, lease()], LIMITS)
    assert len(intake.generate) == 1
    ((_, why),) = intake.bad
    assert reason in why


def test_prompt_and_response_share_the_window() -> None:
    intake = sort_leases([lease(prompt=(1,) * 15)], LIMITS)
    assert intake.generate[0].request(LIMITS.window_tokens).max_new_tokens == 5
    assert np.asarray(intake.generate[0].prefix_ids).size == 0
