"""Routing replay from the engine's answers to the learner's log-probs.

The engine here is the learner's own model, made to run experts drawn at random. What vLLM would say
of its forward goes through the worker's sink, its buffers, segments and the journal into a batch;
replayed, the batch must give the log-probs of that forward, and with rows one off it must not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from learner.algorithms.selection import Selected
from learner.backends.base import ScoredSequence
from learner.backends.collate import collate
from learner.backends.routing_replay import replayed_routing
from learner.backends.torch_backend import TorchBackend, TorchSettings
from learner.batch import BatchItem, TrainBatch
from learner.journal import Journal
from learner.record import BatchRecord, decode_rollout
from learner.step_metrics import TrainedStep, step_metrics
from ringasync.broker.types import Lease, RawGroup, RawRollout
from ringasync.config.schema import LearnerConfig, LossConfig
from ringasync.errors import SchemaError, TrainingError
from ringasync.records.routing import RoutedRows
from ringasync.records.segment import decode_segment, encode_segment, policy_segment
from tests.workers.test_vllm_sink import added, output
from workers.buffers import local_rollout
from workers.engines.vllm.routed_experts import RoutedShape
from workers.engines.vllm.token_sink import TokenSink

from .kit import VOCAB, tiny_model
from .moe_kit import tiny_moe

PROMPT, RESPONSE = 5, 9
FIRST_LEASE = 4
"""Tokens that the first worker samples; the second goes on."""
SHAPE = RoutedShape(layers=2, experts_per_token=2, num_experts=4)
LOSS = LossConfig(routing_replay=True)


class Rollout:
    """Tokens and random experts, and the log-probs of the forward that runs them."""

    def __init__(self, model: Any, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        width = PROMPT + RESPONSE
        ids = torch.randint(0, VOCAB, (1, width), generator=generator)
        self.experts = torch.rand((1, width, 2, 4), generator=generator).argsort(-1)[..., :2]
        with torch.no_grad(), replayed_routing(model, self.experts):
            logits = model(input_ids=ids, use_cache=False).logits
        of_next = logits.log_softmax(-1)[0, PROMPT - 1 : -1]
        self.tokens: list[int] = ids[0, PROMPT:].tolist()
        self.prompt = tuple(ids[0, :PROMPT].tolist())
        self.logprobs: list[float] = of_next.gather(1, ids[0, PROMPT:, None])[:, 0].tolist()

    def given(self, start: int, end: int) -> RoutedRows:
        """What vLLM says of input positions ``start`` to ``end``."""
        rows: RoutedRows = self.experts[0, start:end].numpy().astype(np.uint8)
        return rows

    def sampled(self, segments: list[bytes], count: int, version: int, swap_at: int) -> list[bytes]:
        """One lease on one worker: ``count`` tokens, a swap before token ``swap_at``."""
        known = [decode_segment(one) for one in segments]
        lease = Lease(
            "g.0", "g", "1.1.x", "train", self.prompt, tuple(segments), 0, RESPONSE, 1, 0, 0
        )
        held = local_rollout(lease, known)
        sink = TokenSink(version)
        sink.routed_shape = SHAPE
        added(sink, "g.0", "x")
        begin = len(held.prefix_ids)
        for index in range(begin, begin + count):
            if index == swap_at:
                sink.relabel(version + 1)
            # The first output of a fresh request has the context's rows; of a resumed one, its last
            # (``routed_experts_prompt_start``).
            first = 0 if index == 0 else PROMPT + index - 1
            sink.process_outputs(
                [
                    output(
                        "x",
                        [self.tokens[index]],
                        [self.logprobs[index]],
                        1 if index == RESPONSE - 1 else None,
                        routed_experts=self.given(first, PROMPT + index),
                    )
                ]
            )
        for chunk in sink.drain():
            held.add(chunk, 0.0)
        sent = list(segments)
        while (item := held.cut(None)) is not None:
            sent.append(item.payload)
            held.acknowledge(0.0)
        return sent

    def segments(self) -> list[bytes]:
        """Of two workers, the second of which takes up a newer version in between."""
        first = self.sampled([], FIRST_LEASE, 1, swap_at=-1)
        return self.sampled(first, RESPONSE - FIRST_LEASE, 2, swap_at=6)


def model() -> Any:
    return tiny_moe().eval()


def record(rollouts: dict[str, list[bytes]], prompt: tuple[int, ...]) -> BatchRecord:
    raw = tuple(
        RawRollout(name, 1.0, "length", 0, tuple(segments)) for name, segments in rollouts.items()
    )
    return BatchRecord(
        batch_id="b0",
        step=0,
        fence=1,
        incarnation=1,
        round_id=0,
        policy_version=1,
        budget_tokens=RESPONSE * len(raw),
        seed=1,
        groups=(RawGroup("g", "toy", prompt, 0, raw),),
        advantages={one.rollout_id: 1.0 for one in raw},
        carried=(),
        order=tuple(Selected(one.rollout_id, "g", RESPONSE) for one in raw),
        surplus=(),
        ages={1: 2, 2: 1, 3: 0},
    )


def through_the_journal(directory: Path, written: BatchRecord) -> TrainBatch:
    journal = Journal.open(directory, "run", fence=1)
    journal.append(written)
    journal.close()
    again = Journal.open(directory, "run", fence=2)
    ((_, read),) = again.read()
    again.close()
    return read.train_batch()


def gap(batch: TrainBatch, loss: LossConfig = LOSS, **learner: Any) -> float:
    """Largest gap between the learner's log-probs and those of the sampling forward, nats."""
    settings = LearnerConfig(lr=0.0, warmup_steps=0, **learner)
    backend = TorchBackend(model(), TorchSettings(settings, loss))
    return float(np.abs(backend.train_batch(batch).tokens.log_ratio).max())


@pytest.fixture(scope="module")
def rollout() -> Rollout:
    return Rollout(model(), seed=11)


@pytest.fixture
def batch(rollout: Rollout, tmp_path: Path) -> TrainBatch:
    segments = rollout.segments()
    assert [decode_segment(one).policy_version for one in segments] == [1, 2, 3]
    return through_the_journal(tmp_path, record({"g.0": segments}, rollout.prompt))


def test_every_position_that_was_read_has_its_row(rollout: Rollout, batch: TrainBatch) -> None:
    (item,) = batch.items
    assert item.trajectory.routed_experts is not None
    assert item.trajectory.policy_versions.tolist() == [1] * 4 + [2] * 2 + [3] * 3
    expected = rollout.given(0, PROMPT + RESPONSE - 1)
    assert np.array_equal(item.trajectory.routed_experts, expected)


@pytest.mark.parametrize("updates", [1, 2])
def test_replay_gives_the_log_probs_that_sampled(batch: TrainBatch, updates: int) -> None:
    """With one update the anchor is the training forward, with two the proximal pass."""
    assert gap(batch, updates_per_batch=updates) < 1e-5
    assert gap(batch, LossConfig(), updates_per_batch=updates) > 0.05


def test_in_float64_they_are_equal_to_the_last_digits(batch: TrainBatch) -> None:
    double = model().double()
    double.set_experts_implementation("eager")  # grouped_mm knows no float64
    exact = Rollout(double, seed=11)
    (micro,) = collate(batch, microbatch_tokens=999, normalizer="budget", routing=True)
    experts = micro.routed_experts
    assert experts is not None
    assert experts[0, -1].tolist() == [[-1, -1], [-1, -1]]  # sampled, not read

    def logprobs(chosen: Tensor) -> Tensor:
        with torch.no_grad(), replayed_routing(double, chosen):
            logits = double(input_ids=micro.input_ids, use_cache=False).logits.log_softmax(-1)
        found: Tensor = logits[micro.rows, micro.columns, micro.targets]
        return found

    expected = torch.tensor(exact.logprobs, dtype=torch.float64)
    torch.testing.assert_close(logprobs(experts), expected, rtol=0, atol=1e-13)
    for shift in (-1, 1):
        assert float((logprobs(experts.roll(shift, dims=1)) - expected).abs().max()) > 0.05


def test_a_whole_batch_of_several_lengths_is_replayed() -> None:
    items = []
    for index in range(3):
        one = Rollout(model(), seed=20 + index)
        raw = RawRollout(f"g.{index}", 1.0, "length", 0, tuple(one.segments()))
        trajectory = decode_rollout("g", "toy", one.prompt, raw)
        items.append(BatchItem(trajectory, 1.0, RESPONSE - 2 * index))
    batch = TrainBatch("b0", 0, RESPONSE, tuple(items), {})
    assert gap(batch) < 1e-5
    assert gap(batch, microbatch_tokens=1) < 1e-5


def test_in_bfloat16_the_gap_is_that_of_half_precision(batch: TrainBatch) -> None:
    settings = LearnerConfig(lr=0.0, warmup_steps=0)

    def mean_gap(loss: LossConfig) -> float:
        backend = TorchBackend(model(), TorchSettings(settings, loss, dtype=torch.bfloat16))
        return float(np.abs(backend.train_batch(batch).tokens.log_ratio).mean())

    assert mean_gap(LOSS) < 0.1 * mean_gap(LossConfig())


def test_missing_rows_are_routed_by_the_learner(rollout: Rollout, tmp_path: Path) -> None:
    """A segment of a build, or of an engine, that recorded nothing."""
    first, *rest = rollout.segments()
    old = decode_segment(first)
    bare = encode_segment(
        policy_segment(
            old.start,
            old.policy_version,
            old.token_ids.tolist(),
            old.behavior_logprobs.tolist(),
        )
    )
    written = record({"g.0": [bare, *rest]}, rollout.prompt)
    (item,) = through_the_journal(tmp_path, written).items
    rows = item.trajectory.routed_experts
    assert rows is not None
    assert (rows[: PROMPT - 1 + FIRST_LEASE] == 255).all()
    assert np.array_equal(rows[PROMPT - 1 + FIRST_LEASE :], rollout.given(8, 13))
    batch = written.train_batch()
    assert gap(batch) > 0.05
    metrics = metrics_of(written, batch)
    assert metrics["tokens_routing_replayed"] == RESPONSE - FIRST_LEASE
    assert metrics["tokens_routing_unknown"] == FIRST_LEASE
    assert metrics["routing_replayed_share"] == pytest.approx(5 / 9)


def metrics_of(written: BatchRecord, batch: TrainBatch, loss: LossConfig = LOSS) -> dict[str, Any]:
    settings = LearnerConfig(lr=0.0, warmup_steps=0)
    result = TorchBackend(model(), TorchSettings(settings, loss)).train_batch(batch)
    return step_metrics(TrainedStep(written, batch, result), loss, 1)


def test_metrics_say_what_was_replayed_only_where_it_is_asked_for(
    rollout: Rollout, batch: TrainBatch
) -> None:
    written = record({"g.0": rollout.segments()}, rollout.prompt)
    assert metrics_of(written, batch)["routing_replayed_share"] == 1.0
    assert metrics_of(written, batch)["tokens_routing_replayed"] == RESPONSE
    assert "routing_replayed_share" not in metrics_of(written, batch, LossConfig())


def test_a_tail_that_does_not_train_is_not_counted(rollout: Rollout, batch: TrainBatch) -> None:
    written = record({"g.0": rollout.segments()}, rollout.prompt)
    cut = TrainBatch("b0", 0, 9, (BatchItem(batch.items[0].trajectory, 1.0, 3),), {})
    assert metrics_of(written, cut)["tokens_routing_replayed"] == 3
    assert gap(cut) < 1e-5


def test_the_probe_is_never_replayed(batch: TrainBatch) -> None:
    """Its log-probs are compared with an engine that routes by itself."""
    trajectory = batch.items[0].trajectory
    asked = ScoredSequence(
        tuple(trajectory.prompt_ids.tolist()), tuple(trajectory.token_ids.tolist())
    )
    settings = LearnerConfig(lr=0.0, warmup_steps=0)
    backend = TorchBackend(model(), TorchSettings(settings, LOSS))
    before = backend.logprobs([asked], temperature=1.0)[0]
    backend.train_batch(batch)
    assert np.array_equal(backend.logprobs([asked], temperature=1.0)[0], before)
    assert np.abs(before - trajectory.behavior_logprobs).max() > 0.05


def test_batches_without_any_routing_train_as_ever(rollout: Rollout) -> None:
    bare = encode_segment(policy_segment(0, 1, rollout.tokens, rollout.logprobs))
    written = record({"g.0": [bare]}, rollout.prompt)
    batch = written.train_batch()
    assert batch.items[0].trajectory.routed_experts is None
    assert gap(batch) == gap(batch, LossConfig())
    assert metrics_of(written, batch)["tokens_routing_unknown"] == RESPONSE


def test_more_rows_than_positions_are_refused(rollout: Rollout) -> None:
    segment = encode_segment(
        policy_segment(0, 1, rollout.tokens[:2], rollout.logprobs[:2], rollout.given(0, 7))
    )
    raw = RawRollout("g.0", 1.0, "stop", 0, (segment,))
    with pytest.raises(SchemaError, match="7 rows of routed experts, but 6 positions"):
        decode_rollout("g", "toy", rollout.prompt, raw)


def test_a_dense_model_is_refused_when_the_learner_starts() -> None:
    settings = TorchSettings(LearnerConfig(), LOSS)
    with pytest.raises(TrainingError, match=r"routing_replay.*Qwen3ForCausalLM has none.*false"):
        TorchBackend(tiny_model(), settings)
