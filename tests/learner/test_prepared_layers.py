"""Checkpointed and compiled layers make the same step; checkpointed ones keep less."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import structlog
import torch
from torch import Tensor, nn

from learner.backends.layers import prepare_layers
from ringasync.config.schema import LossConfig

from .kit import tiny_model, toy_batch
from .moe_kit import tiny_moe
from .test_packing import check_same_step
from .test_token_scores import CHUNK, routed_batch, stepped


def kept_bytes(model: nn.Module) -> int:
    """What a forward keeps for its backward."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.arange(1, 97)[None] % 16
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # type: ignore[operator]
    hidden.sum().backward()
    return sum(kept.values())


@pytest.mark.parametrize("packing", ["sequences", "off"])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_checkpointed_layers_make_the_same_step(kind: str, packing: str) -> None:
    make = tiny_model if kind == "dense" else tiny_moe
    learner = {"packing": packing, "microbatch_tokens": 60}
    plain = stepped(make(), toy_batch(), CHUNK, learner=learner)
    again = stepped(
        make(), toy_batch(), CHUNK, learner={**learner, "activation_checkpointing": True}
    )
    check_same_step(again, plain)


def test_checkpointed_layers_run_again_by_the_replayed_routing() -> None:
    loss = LossConfig.model_validate(
        {"mismatch": "none", "routing_replay": True, "router_balance_coef": 0.1}
    )
    plain, again = (
        stepped(
            tiny_moe(),
            routed_batch(),
            CHUNK,
            loss=loss,
            learner={"activation_checkpointing": on, "microbatch_tokens": 60},
        )
        for on in (False, True)
    )
    check_same_step(again, plain)
    assert again[0].terms == pytest.approx(dict(plain[0].terms), rel=1e-5)


def test_checkpointed_layers_keep_little() -> None:
    plain, less = tiny_model(), tiny_model()
    for model in (plain, less):
        model.eval()
    names = list(less.state_dict())
    assert prepare_layers(less, checkpointing=True, compiled=False) == 2
    assert list(less.state_dict()) == names
    assert kept_bytes(less) < 0.5 * kept_bytes(plain)


def test_a_model_without_layers_is_left_and_the_log_tells() -> None:
    with structlog.testing.capture_logs() as logs:
        assert prepare_layers(nn.Linear(2, 2), checkpointing=True, compiled=False) == 0
    assert "have no effect" in logs[0]["event"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default")  # of the compiler's own making
def test_compiled_layers_make_the_same_step() -> None:
    """Packed and padded, checkpointed too: one program serves all."""
    expected = stepped(tiny_model(), toy_batch(), CHUNK, learner={"microbatch_tokens": 60})
    for changes in ({"activation_checkpointing": True}, {"packing": "off"}):
        learner: dict[str, Any] = {"microbatch_tokens": 60, "compile": True, **changes}
        check_same_step(stepped(tiny_model(), toy_batch(), CHUNK, learner=learner), expected)


@pytest.mark.parametrize(("kind", "off"), [("dense", 0.1), ("moe", 0.3)])
def test_residuals_are_in_the_dtype_of_the_forwards_if_asked(kind: str, off: float) -> None:
    """Else autocast leaves them in float32. The step is the same but for the rounding, by which
    tokens may go to other experts too."""
    steps, seen = {}, set[torch.dtype]()
    for residual in ("float32", "model"):
        model = tiny_model() if kind == "dense" else tiny_moe()
        learner = {"residual_dtype": residual, "microbatch_tokens": 60}
        steps[residual] = stepped(model, toy_batch(), CHUNK, dtype=torch.bfloat16, learner=learner)
        seen.clear()
        for layer in model.base_model.layers:  # type: ignore[union-attr]
            layer.register_forward_hook(lambda _layer, _args, output: seen.add(output.dtype))
        steps[residual][2].train_batch(toy_batch())
        assert seen == {torch.float32 if residual == "float32" else torch.bfloat16}
    (fine, gradients, _), (coarse, rounded, _) = steps.values()
    assert coarse.grad_norm != fine.grad_norm
    assert coarse.grad_norm == pytest.approx(fine.grad_norm, rel=0.05)
    for name, gradient in gradients.items():
        assert rounded[name].dtype == torch.float32
        assert float((rounded[name] - gradient).norm()) <= off * float(gradient.norm()), name


def test_residuals_stay_as_they_are_in_float32_runs() -> None:
    learner = {"residual_dtype": "model", "microbatch_tokens": 60}
    plain = stepped(tiny_model(), toy_batch(), CHUNK, learner={"microbatch_tokens": 60})
    check_same_step(stepped(tiny_model(), toy_batch(), CHUNK, learner=learner), plain)
