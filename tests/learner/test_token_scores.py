"""Log-probs in chunks of positions: the same step as with all logits at once, in less memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import structlog
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from learner.backends.base import StepResult
from learner.backends.collate import Positions
from learner.backends.step_timer import StepTimer
from learner.backends.token_scores import TokenScores, head_problem
from learner.backends.torch_backend import TorchBackend, TorchSettings
from learner.batch import TrainBatch
from ringasync.config.schema import LossConfig

from .backend_contract import learner_config, scored
from .kit import VOCAB, tiny_model, toy_batch
from .moe_kit import tiny_moe

CHUNK = 7
"""Divides no number of trained tokens here, so that a last, shorter chunk is always there."""
CPU = torch.device("cpu")


def small(kind: str, **changes: Any) -> nn.Module:
    """A causal LM of two layers by the class of its configuration, random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings: dict[str, Any] = {
        **{"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "head_dim": 16},
        **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
        **{"max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1},
        **{"eos_token_id": 2, **changes},
    }
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    return model


def routed_batch(layers: int = 2, experts: int = 4) -> TrainBatch:
    """``toy_batch`` with two of the experts drawn at random for every input position."""
    batch = toy_batch()
    items = []
    for item in batch.items:
        one = item.trajectory
        count = one.prompt_ids.shape[0] + one.num_tokens - 1
        drawn = np.random.default_rng(count).random((count, layers, experts)).argsort(-1)
        routed = drawn[..., :2].astype(np.uint8)
        items.append(replace(item, trajectory=replace(one, routed_experts=routed)))
    return replace(batch, items=tuple(items))


def stepped(
    model: nn.Module, batch: TrainBatch, chunk_tokens: int, **settings: Any
) -> tuple[StepResult, dict[str, Tensor], TorchBackend]:
    """One step; the gradients by name, unclipped: AdamW's first moment is a tenth of them."""
    loss = settings.pop("loss", LossConfig(mismatch="none"))
    learner = learner_config(
        logprob_chunk_tokens=chunk_tokens, grad_clip=1e9, **settings.pop("learner", {})
    )
    backend = TorchBackend(model, TorchSettings(learner, loss, 0.8, **settings))
    result = backend.train_batch(batch)
    found = {
        name: tensor * 10
        for name, tensor in backend.state_dict().items()
        if name.endswith(".exp_avg")
    }
    return result, found, backend


def check_same(one: StepResult, other: StepResult) -> None:
    assert one.loss == pytest.approx(other.loss, rel=1e-6)
    assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)
    np.testing.assert_allclose(one.tokens.log_ratio, other.tokens.log_ratio, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(one.tokens.entropy, other.tokens.entropy, rtol=1e-5)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tied": lambda: tiny_model(tied=True),
    "untied": lambda: tiny_model(tied=False),
    "moe": lambda: tiny_moe(tied=False),
    "moe-tied": lambda: tiny_moe(tied=True),
    "head-with-bias": lambda: small("phi"),
    "logits-scaled-by-one": lambda: small("granite", logits_scaling=1.0),
}


@pytest.mark.parametrize("kind", MODELS)
def test_chunks_make_the_same_step(kind: str) -> None:
    batch = toy_batch()
    plain, expected, _ = stepped(MODELS[kind](), batch, 0)
    chunked, gradients, backend = stepped(MODELS[kind](), batch, CHUNK)
    assert backend._scores.chunk_tokens == CHUNK
    check_same(chunked, plain)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=2e-6, msg=name)


def test_chunks_make_the_same_step_under_routing_replay() -> None:
    loss = LossConfig(mismatch="none", routing_replay=True)
    plain, expected, _ = stepped(tiny_moe(), routed_batch(), 0, loss=loss)
    chunked, gradients, _ = stepped(tiny_moe(), routed_batch(), CHUNK, loss=loss)
    check_same(chunked, plain)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=2e-6, msg=name)
    own, _, _ = stepped(tiny_moe(), toy_batch(), CHUNK)
    assert not np.allclose(own.tokens.log_ratio, chunked.tokens.log_ratio, atol=1e-4)


@pytest.mark.parametrize(("widest", "runs"), [(0, 3), (15, 3), (22, 4), (40, 6)])
def test_the_head_runs_as_often_as_on_the_widest_rank(widest: int, runs: int) -> None:
    """Of sharded weights it is gathered each time, by all ranks together; nothing else changes."""
    model: Any = tiny_model(tied=False)
    scores = TokenScores(model, torch.float32, CHUNK)
    columns = torch.arange(15)
    ids = torch.arange(16)[None] % VOCAB
    wanted = Positions(ids, torch.zeros_like(columns), columns, ids[0, 1:], widest=widest)
    expected, _ = scores.score(replace(wanted, widest=0), 0.8)
    expected.sum().backward()  # type: ignore[no-untyped-call]
    gradients = [one.grad.clone() for one in model.parameters()]
    model.zero_grad()
    shapes: list[int] = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _module, inputs, _output: shapes.append(len(inputs[0])))
    found, entropy = scores.score(wanted, 0.8, entropy=True)
    assert len(shapes) == runs
    assert sum(shapes) == 15
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert len(shapes) == 2 * runs  # each computed again
    assert torch.equal(found, expected)
    assert entropy.shape == (15,)
    assert all(
        torch.equal(one.grad, other)
        for one, other in zip(model.parameters(), gradients, strict=True)
    )


@pytest.mark.parametrize("chunk_tokens", [0, CHUNK])
@pytest.mark.parametrize("tied", [True, False])
def test_step_against_float64_by_hand(chunk_tokens: int, tied: bool) -> None:
    batch, temperature = toy_batch(), 0.8
    reference = tiny_model(tied=tied).double()
    total = torch.zeros((), dtype=torch.float64)
    logprobs = []
    for item in batch.items:
        one = item.trajectory
        ids = torch.tensor(np.concatenate([one.prompt_ids, one.token_ids]).astype(np.int64))
        logits = reference(input_ids=ids[None]).logits[0] / temperature
        exact = logits - logits.exp().sum(-1, keepdim=True).log()
        first = one.prompt_ids.shape[0]
        chosen = torch.stack([exact[i - 1, ids[i]] for i in range(first, ids.shape[0])])
        logprobs.append(chosen.detach())
        # One update: the ratio to theta_old is 1 and its gradient that of the log-prob.
        ratio = (chosen - chosen.detach()).exp()
        total = total - item.advantage * ratio.sum() / batch.budget_tokens
    total.backward()  # type: ignore[no-untyped-call]
    result, gradients, _ = stepped(tiny_model(tied=tied), batch, chunk_tokens)
    assert result.loss == pytest.approx(float(total.detach()), rel=1e-6)
    for name, parameter in reference.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(
            gradients[f"optim.{name}.exp_avg"], parameter.grad.float(), rtol=1e-4, atol=1e-6
        )
    fresh, _, scorer = stepped(tiny_model(tied=tied), batch, chunk_tokens, learner={"lr": 0.0})
    assert fresh.loss == result.loss
    for values, known in zip(
        scorer.logprobs(scored(batch), temperature=temperature), logprobs, strict=True
    ):
        np.testing.assert_allclose(values, known.numpy(), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("head_dtype", ["model", "float32"])
def test_chunks_make_the_same_step_in_bfloat16(head_dtype: str) -> None:
    settings: dict[str, Any] = {"dtype": torch.bfloat16, "head_dtype": head_dtype}
    plain, expected, _ = stepped(tiny_model(), toy_batch(), 0, **settings)
    chunked, gradients, backend = stepped(tiny_model(), toy_batch(), CHUNK, **settings)
    assert backend._scores.chunk_tokens == CHUNK
    assert chunked.loss == pytest.approx(plain.loss, rel=1e-6)
    # Other shapes may round a bfloat16 logit to its neighbour; a float32 one has none so far.
    far = 1e-5 if head_dtype == "float32" else 0.02
    np.testing.assert_allclose(chunked.tokens.log_ratio, plain.tokens.log_ratio, atol=far)
    for name, gradient in gradients.items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert float(error) < 0.02, name


def test_gradients_of_chunks_are_added_in_float32() -> None:
    """As near to float32 as the plain way, however many chunks the LM head's gradient comes in."""

    def error(chunk_tokens: int) -> float:
        _, exact, _ = stepped(tiny_model(tied=False), toy_batch(12), 0)
        _, found, _ = stepped(
            tiny_model(tied=False), toy_batch(12), chunk_tokens, dtype=torch.bfloat16
        )
        name = "optim.lm_head.weight.exp_avg"
        return float((found[name] - exact[name]).norm() / exact[name].norm())

    assert error(2) < 1.2 * error(0)


@pytest.mark.parametrize(
    ("kind", "changes", "why"),
    [
        ("gemma2", {"final_logit_softcapping": 30.0}, "scale or a softcap"),
        ("cohere", {"logit_scale": 0.0625}, "scale or a softcap"),
        ("granite", {"logits_scaling": 4.0}, "scale or a softcap"),
    ],
)
def test_a_head_that_is_not_understood_is_computed_at_once(
    kind: str, changes: dict[str, Any], why: str
) -> None:
    with structlog.testing.capture_logs() as logs:
        result, _, backend = stepped(small(kind, **changes), toy_batch(), CHUNK)
        backend.train_batch(toy_batch(step=1))
        backend.logprobs(scored(toy_batch()), temperature=1.0)
    told = [line for line in logs if "logprob_chunk_tokens" in line["event"]]
    assert len(told) == 1
    assert why in told[0]["why"]
    assert backend._scores.chunk_tokens == 0
    plain, _, _ = stepped(small(kind, **changes), toy_batch(), 0)
    assert (result.loss, result.grad_norm) == (plain.loss, plain.grad_norm)


def test_a_model_that_is_its_own_body_is_not_understood() -> None:
    assert "no LM head apart" in head_problem(nn.Linear(2, 2), CPU)
    assert head_problem(tiny_model(), CPU) == ""


class LargestLogits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Rows of the largest tensor [rows..., vocabulary] that any operation makes."""

    def __init__(self, vocab: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._vocab = vocab
        self.rows = 0
        self.tensors = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, Tensor) and one.ndim and one.shape[-1] == self._vocab:
                self.tensors += 1
                self.rows = max(self.rows, math.prod(one.shape[:-1]))
        return made


@pytest.mark.parametrize("updates", [1, 2])
def test_no_array_of_all_tokens_times_the_vocabulary_is_made(updates: int) -> None:
    """In forward and backward, and in the proximal pass; the plain way makes several."""
    vocab, hidden = 509, 32  # a prime, so that no other side is as long
    batch = toy_batch()
    trained = sum(item.trained_tokens for item in batch.items)
    rows = {}
    for chunk_tokens in (0, hidden):
        torch.manual_seed(0)
        model = small("qwen3", vocab_size=vocab, hidden_size=hidden, tie_word_embeddings=False)
        learner = learner_config(logprob_chunk_tokens=chunk_tokens, updates_per_batch=updates)
        backend = TorchBackend(model, TorchSettings(learner, LossConfig(mismatch="none")))
        with LargestLogits(vocab) as seen:
            backend.train_batch(batch)
            backend.logprobs(scored(batch), temperature=1.0)
        assert seen.tensors > 0
        rows[chunk_tokens] = seen.rows
    assert rows[0] >= trained > 2 * hidden
    # ``hidden`` rows are also what the transposed weight of the LM head has.
    assert rows[hidden] == hidden


def test_one_chunk_is_not_computed_twice() -> None:
    class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.count: int = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            made = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.mm.default and made.shape[-1] == 509:
                self.count += 1
            return made

    def products(chunk_tokens: int) -> Any:
        model = small("qwen3", vocab_size=509, tie_word_embeddings=False)
        learner = learner_config(logprob_chunk_tokens=chunk_tokens)
        backend = TorchBackend(model, TorchSettings(learner, LossConfig(mismatch="none")))
        with Products() as seen:
            backend.train_batch(toy_batch())
        return seen.count

    trained = sum(item.trained_tokens for item in toy_batch().items)
    assert products(trained) == 1
    assert products(math.ceil(trained / 3)) == 2 * 3


def test_one_update_needs_no_proximal_pass() -> None:
    """The pass would give what the update's forward gives: the step is the same in every bit."""
    from learner.backends.collate import collate

    states = []
    for explicit in (False, True):
        settings = TorchSettings(learner_config(logprob_chunk_tokens=CHUNK), LossConfig())
        backend = TorchBackend(tiny_model(), settings)
        micros = collate(toy_batch(), microbatch_tokens=60, normalizer="budget")
        assert len(micros) > 1
        proximal = None
        if explicit:
            with torch.no_grad():
                proximal = [backend._accumulation.score(micro)[0] for micro in micros]
        result = backend._update(
            micros, proximal, backend._terms.prepare_batch(micros, 1.0), StepTimer(CPU)
        )
        states.append((result.loss, result.grad_norm, backend.state_dict()))
    (loss, norm, one), (other_loss, other_norm, other) = states
    assert (loss, norm) == (other_loss, other_norm)
    assert all(torch.equal(one[name], other[name]) for name in one)
