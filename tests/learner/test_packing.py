"""Packed micro-batches make the step of padded ones; what cannot be packed is padded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import structlog
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from learner.backends import flash4
from learner.backends import packing as packed
from learner.backends.base import StepResult
from learner.backends.collate import collate
from learner.backends.packing import choose_packing, packing_problem, use_packed_attention
from learner.backends.step_timer import StepTimer
from learner.backends.torch_backend import TorchBackend, TorchSettings
from learner.batch import TrainBatch
from ringasync.config.schema import LossConfig
from ringasync.errors import NonFiniteLogprobError

from .backend_contract import learner_config
from .kit import VOCAB, tiny_model, toy_batch
from .moe_kit import tiny_moe
from .test_token_scores import CHUNK, routed_batch, small, stepped

CPU = torch.device("cpu")
Gradients = dict[str, Tensor]


def by_length(result: StepResult) -> list[tuple[float, ...]]:
    """What is known of each token, in an order that does not depend on the micro-batches."""
    tokens = result.tokens
    return sorted(zip(np.round(tokens.log_ratio, 4), np.round(tokens.weights, 4), strict=True))


def check_same_step(
    one: tuple[StepResult, Gradients, Any], other: tuple[StepResult, Gradients, Any]
) -> None:
    assert one[0].loss == pytest.approx(other[0].loss, rel=1e-5)
    assert one[0].grad_norm == pytest.approx(other[0].grad_norm, rel=1e-5)
    np.testing.assert_allclose(by_length(one[0]), by_length(other[0]), atol=2e-4)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], rtol=1e-4, atol=2e-6, msg=name)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gqa": lambda: tiny_model(tied=True),
    "moe": lambda: tiny_moe(tied=False),
    # Rotary positions are relative; learned ones show whether each sequence begins at 0.
    "learned-positions": lambda: small("opt", ffn_dim=48, word_embed_proj_dim=32),
    "llama": lambda: small("llama"),
    "qwen2": lambda: small("qwen2"),
    "logits-scaled": lambda: small("granite", logits_scaling=2.0),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("chunk", [0, CHUNK])
def test_packed_makes_the_step_of_padded(kind: str, chunk: int) -> None:
    loss = LossConfig(mismatch="none")
    found = [
        stepped(
            MODELS[kind](),
            toy_batch(),
            chunk,
            loss=loss,
            learner={"packing": packing, "microbatch_tokens": 60},
        )
        for packing in ("sequences", "off")
    ]
    assert [backend._packing for *_, backend in found] == ["sequences", None]
    check_same_step(*found)


def test_packed_makes_the_step_of_padded_with_every_term_and_replayed_routing() -> None:
    loss = LossConfig.model_validate(
        {
            **{"mismatch": "none", "routing_replay": True, "entropy_coef": 0.01, "kl_coef": 0.1},
            **{"router_balance_coef": 0.1, "router_z_coef": 0.1},
        }
    )
    # One micro-batch: the balance loss of several is a mean of theirs, whichever they are.
    packed, padded = (
        stepped(tiny_moe(), routed_batch(), CHUNK, loss=loss, learner={"packing": packing})
        for packing in ("sequences", "off")
    )
    check_same_step(packed, padded)
    assert packed[0].terms.keys() == padded[0].terms.keys() != set()
    for name, value in packed[0].terms.items():
        assert value == pytest.approx(padded[0].terms[name], rel=1e-4, abs=1e-6), name


def test_micro_batches_are_full_and_without_padding() -> None:
    micros = collate(toy_batch(), microbatch_tokens=60, normalizer="budget", packing="sequences")
    lengths = [length for one in micros if one.packing for length in one.packing.lengths]
    every = [one.trajectory.prompt_ids.size + one.scored_tokens for one in toy_batch().items]
    assert sorted(lengths) == sorted(every)
    for micro in micros:
        assert micro.packing is not None
        assert micro.input_ids.shape == (1, sum(micro.packing.lengths))
        assert micro.input_ids.shape[1] <= 60
        assert micro.packing.bounds.tolist()[-1] == micro.input_ids.shape[1]
        predicted = micro.input_ids[0, micro.columns + 1]
        assert torch.equal(predicted, micro.targets)
    assert len(micros) < len(collate(toy_batch(), microbatch_tokens=60, normalizer="budget"))


def test_the_rollout_with_a_nonfinite_logprob_is_named() -> None:
    (micro,) = collate(toy_batch(), microbatch_tokens=999, normalizer="budget", packing="sequences")
    first = 0
    assert micro.packing is not None
    for owner, length in zip(micro.owners, micro.packing.lengths, strict=True):
        own = (micro.columns >= first) & (micro.columns < first + length)
        problem = micro.nonfinite(torch.where(own, torch.nan, 0.0), "the test")
        assert isinstance(problem, NonFiniteLogprobError)
        assert f"rollout {owner};" in str(problem)
        first += length


@pytest.mark.parametrize(
    ("kind", "changes", "why"),
    [
        ("mistral", {"sliding_window": 4}, "sliding window"),
        ("gemma2", {"sliding_window": 4}, "layers of other kinds"),
        ("mamba", {}, ""),
    ],
)
def test_a_model_that_cannot_be_packed_is_padded(
    kind: str, changes: dict[str, Any], why: str
) -> None:
    model = small(kind, **changes)
    with structlog.testing.capture_logs() as logs:
        assert choose_packing(model, "auto", CPU, torch.float32) is None
    (line,) = [line for line in logs if "learner.packing" in line["event"]]
    assert line["why"]
    assert why in line["why"]


def test_attention_that_crosses_sequences_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from learner.backends import packing

    assert packing_problem(tiny_model()) == ""
    plain = packing._by_sequence

    def leaking(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float | None) -> Tensor:
        whole: Tensor = plain(q, k, v, bounds[[0, -1]], scale)
        return whole

    monkeypatch.setattr(packing, "_by_sequence", leaking)
    assert "a packed row changes its logits" in packing_problem(tiny_model())


def test_a_probed_model_is_left_as_it_came_and_padded_rows_stay_as_they_are() -> None:
    model: Any = tiny_model()
    before = model.config._attn_implementation
    ids = torch.arange(1, 21).reshape(2, 10) % VOCAB
    plain = model(input_ids=ids).logits
    assert packing_problem(model) == ""
    assert model.config._attn_implementation == before
    use_packed_attention(model)
    assert torch.equal(model(input_ids=ids).logits, plain)


def test_varlen_where_it_cannot_be_had_runs_by_sequence_and_says_so() -> None:
    with structlog.testing.capture_logs() as logs:
        assert choose_packing(tiny_model(), "varlen", CPU, torch.float32) == "sequences"
    assert any("'varlen' needs" in line["event"] for line in logs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="its kernel works here")
@pytest.mark.skipif(packed._kernel is None, reason="this torch has no varlen attention")
def test_a_kernel_that_fails_with_these_heads_is_told_and_not_used() -> None:
    with structlog.testing.capture_logs() as logs:
        found = choose_packing(tiny_model(), "auto", torch.device("cuda"), torch.bfloat16)
    assert found == "sequences"
    (line,) = (one for one in logs if one["log_level"] == "warning")
    assert "sequence by sequence" in line["event"]
    assert "it failed with" in line["why"]


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts values that the program waits for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def reads_of(batch: TrainBatch, limit: int) -> tuple[int, int]:
    """Micro-batches, and values read while their gradients are added up."""
    loss = LossConfig.model_validate({"entropy_coef": 0.01, "kl_coef": 0.1})
    learner = learner_config(microbatch_tokens=limit, logprob_chunk_tokens=CHUNK)
    backend = TorchBackend(tiny_model(), TorchSettings(learner, loss))
    micros = collate(batch, microbatch_tokens=limit, normalizer="budget", packing="sequences")
    fixed = backend._terms.prepare_batch(micros, 1.0)
    with _Reads() as reads:  # type: ignore[no-untyped-call]
        backend._update(micros, None, fixed, StepTimer(CPU))
    return len(micros), reads.count


def test_no_micro_batch_waits_for_the_device() -> None:
    (few, once), (many, as_often) = (reads_of(toy_batch(), limit) for limit in (999, 30))
    assert many > few
    assert as_often == once


def test_the_time_of_a_batch_is_told_by_part() -> None:
    backend = TorchBackend(tiny_model(), TorchSettings(learner_config(), LossConfig()))
    seconds = backend.train_batch(toy_batch()).seconds
    assert set(seconds) == {"forward", "backward", "optimizer"}
    assert all(value > 0 for value in seconds.values())


def test_routing_of_packed_rows_stands_where_its_tokens_stand() -> None:
    batch = routed_batch()
    (micro,) = collate(
        batch, microbatch_tokens=999, normalizer="budget", routing=True, packing="sequences"
    )
    assert micro.packing is not None
    assert micro.routed_experts is not None
    recorded = {one.trajectory.rollout_id: one.trajectory.routed_experts for one in batch.items}
    first = 0
    for owner, length in zip(micro.owners, micro.packing.lengths, strict=True):
        rows = recorded[owner]
        assert rows is not None
        own = micro.routed_experts[0, first : first + length].numpy()
        np.testing.assert_array_equal(own[: len(rows)], rows[:length])
        assert (own[len(rows) :] == -1).all()
        first += length
    assert first == micro.input_ids.shape[1]
    cut = replace(batch, items=batch.items[:1])
    assert len(collate(cut, microbatch_tokens=1, normalizer="budget", packing="sequences")) == 1


@pytest.mark.skipif(flash4.installed(), reason="flash-attn-4 is installed")
def test_flash_attention_4_that_is_missing_is_told_and_not_used() -> None:
    def probe() -> float:
        raise AssertionError("nothing to probe")

    assert "extra `flash`" in flash4.use_flash4(True, CPU, probe)
    assert not flash4.is_used()
    assert flash4.use_flash4(False, CPU, probe) == ""
