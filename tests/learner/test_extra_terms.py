"""KL, entropy and router losses in a training step: values and gradients of the plain formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from learner.algorithms.extra_losses import entropy, kl_values
from learner.algorithms.router_losses import balance_loss, z_loss
from learner.backends import token_scores
from learner.backends.base import StepResult
from learner.backends.router_terms import RouterWatch
from learner.backends.torch_backend import TorchBackend, TorchSettings
from learner.batch import TrainBatch
from ringasync.config.schema import LossConfig
from ringasync.errors import TrainingError

from .backend_contract import learner_config
from .kit import tiny_model, toy_batch
from .moe_kit import tiny_moe
from .test_token_scores import routed_batch

TEMPERATURE = 0.8


def flat(batch: TrainBatch) -> TrainBatch:
    """The batch without advantages: all gradient comes from the extra terms."""
    return replace(batch, items=tuple(replace(item, advantage=0.0) for item in batch.items))


def backend_of(model: nn.Module, loss: dict[str, Any], **settings: Any) -> TorchBackend:
    learner = learner_config(grad_clip=1e9, **settings.pop("learner", {}))
    config = LossConfig.model_validate({"mismatch": "none", **loss})
    return TorchBackend(model, TorchSettings(learner, config, TEMPERATURE, **settings))


def gradients(backend: TorchBackend) -> dict[str, Tensor]:
    """After a first step: AdamW's first moment is a tenth of the gradient."""
    return {
        name.removeprefix("optim.").removesuffix(".exp_avg"): tensor * 10
        for name, tensor in backend.state_dict().items()
        if name.endswith(".exp_avg")
    }


def stepped(
    model: nn.Module, batch: TrainBatch, loss: dict[str, Any], **settings: Any
) -> tuple[StepResult, dict[str, Tensor]]:
    backend = backend_of(model, loss, **settings)
    return backend.train_batch(batch), gradients(backend)


def plain(
    model: nn.Module, batch: TrainBatch, of_row: Callable[[Tensor, Tensor, Any], Tensor]
) -> tuple[float, dict[str, Tensor]]:
    """Sum of ``of_row(logits of trained tokens [N, V], targets [N], output)`` and its gradients,
    row by row on the bare model."""
    model.eval()
    total = torch.zeros(())
    for item in batch.items:
        prompt, response = item.trajectory.prompt_ids, item.trajectory.token_ids
        ids = torch.tensor([[*prompt.tolist(), *response.tolist()]])
        moe = {"output_router_logits": True} if hasattr(model, "num_experts") else {}
        output = model(input_ids=ids, **moe)
        logits = output.logits[0, len(prompt) - 1 : -1] / TEMPERATURE
        total = total + of_row(logits, ids[0, len(prompt) :], output)
    total.backward()  # type: ignore[no-untyped-call]
    found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return total.item(), found


def check_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert any(bool(one.abs().max() > 1e-6) for one in expected.values())
    for name, gradient in found.items():
        wanted = expected.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-6, msg=name)


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


# KL


@pytest.mark.parametrize("kind", ["dense", "moe", "moe-replayed", "bfloat16"])
def test_under_the_starting_weights_the_kl_is_exactly_zero(kind: str) -> None:
    low: dict[str, Any] = {"dtype": torch.bfloat16, "head_dtype": "float32"}
    settings = low if kind == "bfloat16" else {}
    batch = routed_batch() if kind == "moe-replayed" else toy_batch()
    extra = {"routing_replay": kind == "moe-replayed"}
    made = [tiny_moe() if kind.startswith("moe") else tiny_model() for _ in range(2)]
    without, expected = stepped(made[0], batch, extra, **settings)
    result, found = stepped(made[1], batch, {"kl_coef": 0.5, **extra}, **settings)
    assert result.terms == {"loss_policy": without.loss, "kl_reference": 0.0}
    assert result.loss == without.loss
    assert without.terms == {}
    assert all(torch.equal(one, expected[name]) for name, one in found.items())


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_is_the_plain_formula_against_the_starting_model(estimator: Any) -> None:
    batch = flat(toy_batch())
    backend = backend_of(tiny_model(), {"kl_coef": 0.5, "kl_estimator": estimator})
    moved = tiny_model(seed=1)
    backend.model.load_state_dict(moved.state_dict())  # the policy left; the reference stayed
    result = backend.train_batch(batch)
    start = tiny_model().eval()
    rows = iter(batch.items)

    def of_row(logits: Tensor, targets: Tensor, _output: Any) -> Tensor:
        one = next(rows).trajectory
        ids = torch.tensor([[*one.prompt_ids.tolist(), *one.token_ids.tolist()]])
        with torch.no_grad():
            theirs = start(input_ids=ids).logits[0, len(one.prompt_ids) - 1 : -1] / TEMPERATURE
        values = kl_values(
            token_logprobs(logits, targets), token_logprobs(theirs, targets), estimator
        )
        return 0.5 * values.sum() / batch.budget_tokens

    loss, expected = plain(moved, batch, of_row)
    assert result.loss == pytest.approx(loss, rel=1e-4)
    assert result.terms["kl_reference"] == pytest.approx(2 * loss, rel=1e-4)
    check_gradients(gradients(backend), expected)


def test_a_token_that_icepop_drops_still_has_its_kl() -> None:
    batch = toy_batch()
    far = tuple(
        replace(item, trajectory=replace(item.trajectory, behavior_logprobs=item_far))
        for item in batch.items
        for item_far in [item.trajectory.behavior_logprobs - 100.0]
    )
    backend = backend_of(tiny_model(), {"mismatch": "icepop", "kl_coef": 0.5})
    backend.model.load_state_dict(tiny_model(seed=1).state_dict())
    result = backend.train_batch(replace(batch, items=far))
    assert not result.tokens.weights.any()
    assert result.terms["loss_policy"] == 0.0
    assert result.terms["kl_reference"] > 0.01
    assert result.grad_norm > 0


def test_a_resumed_learner_has_the_starting_model_for_reference(tmp_path: Path) -> None:
    loss = {"kl_coef": 0.5, "kl_estimator": "k2"}
    straight = backend_of(tiny_model(), loss, learner={"lr": 1e-2, "updates_per_batch": 2})
    straight.train_batch(toy_batch())
    straight.begin_save(tmp_path / "saved").result()
    resumed = backend_of(tiny_model(), loss, learner={"lr": 1e-2, "updates_per_batch": 2})
    resumed.load(tmp_path / "saved")
    for one in (straight, resumed):  # away from the device and back: the reference comes along
        one.offload()
        one.onload()
    first, second = (one.train_batch(toy_batch(step=1)) for one in (straight, resumed))
    assert first.terms == second.terms
    assert first.terms["kl_reference"] > 1e-3
    assert straight.state_dict().keys() == backend_of(tiny_model(), {}).state_dict().keys() | {
        name for name in straight.state_dict() if name.startswith("optim.")
    }


# Entropy


@pytest.mark.parametrize("chunk_tokens", [0, 7])
@pytest.mark.parametrize("coefficient", [0.3, -0.3])
def test_entropy_is_the_plain_formula(
    chunk_tokens: int, coefficient: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_scores, "_ENTROPY_MAX_VOCAB", 8)  # the vocabulary is above it
    batch = flat(toy_batch())
    result, found = stepped(
        tiny_model(),
        batch,
        {"entropy_coef": coefficient},
        learner={"logprob_chunk_tokens": chunk_tokens},
    )

    def of_row(logits: Tensor, _targets: Tensor, _output: Any) -> Tensor:
        return -coefficient * entropy(logits).sum() / batch.budget_tokens

    loss, expected = plain(tiny_model(), batch, of_row)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.terms["entropy_bonus"] == pytest.approx(-loss / coefficient, rel=1e-5)
    check_gradients(found, expected)


def test_a_positive_coefficient_raises_the_entropy_and_a_negative_one_lowers_it() -> None:
    after = {}
    for coefficient in (1.0, -1.0):
        backend = backend_of(tiny_model(), {"entropy_coef": coefficient}, learner={"lr": 1e-2})
        seen = [backend.train_batch(flat(toy_batch())).tokens.entropy.mean() for _ in range(4)]
        after[coefficient] = seen[-1] - seen[0]
    assert after[1.0] > 0.001
    assert after[-1.0] < -0.001


# Routers


def test_router_losses_are_the_plain_formula_on_one_row() -> None:
    batch = flat(toy_batch())
    batch = replace(batch, items=batch.items[-1:])
    coefficients = {"router_balance_coef": 0.5, "router_z_coef": 0.25}
    result, found = stepped(tiny_moe(), batch, coefficients)

    def of_row(_logits: Tensor, _targets: Tensor, output: Any) -> Tensor:
        parts = [
            (0.5 * balance_loss(one, one.topk(2).indices) + 0.25 * z_loss(one))
            for one in output.router_logits
        ]
        return torch.stack(parts).mean()

    loss, expected = plain(tiny_moe(), batch, of_row)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.terms["router_balance"] >= 0.9
    check_gradients(found, expected)


def test_router_losses_speak_of_the_routers_own_choice_under_replay() -> None:
    batch = flat(routed_batch())
    loss = {"routing_replay": True, "router_balance_coef": 0.5}
    result, found = stepped(tiny_moe(), batch, loss)
    assert result.terms["router_balance"] > 0
    assert any("gate" in name and bool(one.any()) for name, one in found.items())


def test_a_forward_run_again_for_checkpointed_activations_gives_the_same_gradients() -> None:
    ids = torch.arange(20)[None]
    found = []
    for checkpointed in (False, True):
        model = tiny_moe().train()  # transformers checkpoints in training mode only
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        watch = RouterWatch(model)
        with watch.watch() as routers:
            logits = model(input_ids=ids, use_cache=False).logits
        balance, z = routers.losses(torch.ones_like(ids, dtype=torch.bool))
        (logits.logsumexp(-1).sum() + balance + z).backward()
        assert len(routers.layers) == 2
        found.append({name: one.grad for name, one in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], msg=name)


@pytest.mark.parametrize("name", ["router_balance_coef", "router_z_coef"])
def test_a_model_without_routers_is_refused(name: str) -> None:
    with pytest.raises(TrainingError, match=rf"loss\.{name}.*set them to 0"):
        backend_of(tiny_model(), {name: 1e-3})


# Splits


@pytest.mark.parametrize("normalizer", ["budget", "sequence"])
def test_any_split_gives_the_same_step(normalizer: str) -> None:
    coefficients = {"kl_coef": 0.5, "entropy_coef": 0.3, "router_z_coef": 0.2}
    results, found = [], []
    for limit in (1, 40, 100_000):  # the last pads the most
        backend = backend_of(
            tiny_moe(),
            {**coefficients, "normalizer": normalizer},
            learner={"microbatch_tokens": limit},
        )
        backend.model.load_state_dict(tiny_moe(seed=1).state_dict())
        results.append(backend.train_batch(toy_batch()))
        found.append(gradients(backend))
    for result, grads in zip(results[1:], found[1:], strict=True):
        for name in ("loss_policy", "kl_reference", "entropy_bonus", "router_z"):
            assert result.terms[name] == pytest.approx(results[0].terms[name], rel=1e-4), name
        assert result.loss == pytest.approx(results[0].loss, rel=1e-4)
        for name, gradient in grads.items():
            torch.testing.assert_close(gradient, found[0][name], rtol=1e-3, atol=1e-6, msg=name)


def test_balance_loss_of_a_batch_is_the_mean_of_its_micro_batches_by_tokens() -> None:
    batch = toy_batch()
    apart, _ = stepped(
        tiny_moe(), batch, {"router_balance_coef": 1.0}, learner={"microbatch_tokens": 1}
    )
    singles, sizes = [], []
    for item in batch.items:
        one = replace(batch, items=(item,))
        singles.append(stepped(tiny_moe(), one, {"router_balance_coef": 1.0})[0])
        sizes.append(len(item.trajectory.prompt_ids) + item.trained_tokens)
    mean = sum(
        size * one.terms["router_balance"] for size, one in zip(sizes, singles, strict=True)
    ) / sum(sizes)
    assert apart.terms["router_balance"] == pytest.approx(mean, rel=1e-5)
