"""Mixture-of-experts models in the torch backend: published format, routers, head, autocast."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from learner.backends.base import Backend
from learner.backends.experts import use_autocast_experts
from learner.backends.heads import use_float32_head
from learner.backends.routers import freeze_routers, router_parameters
from learner.backends.torch_backend import TorchBackend, TorchSettings
from learner.devices import resolve_device
from ringasync.config.schema import LearnerConfig, LossConfig
from ringasync.errors import ConfigError
from ringasync.weights.manifest import tensor_infos

from .backend_contract import BackendContract, learner_config, scored, weights_equal
from .checkpoint_kit import restore
from .kit import VOCAB, tiny_model, toy_batch
from .moe_kit import tiny_moe


def backend_of(model: Any, **changes: Any) -> TorchBackend:
    learner = changes.pop("learner", None) or learner_config()
    return TorchBackend(model, TorchSettings(learner, LossConfig(), **changes))


class TestMoeBackend(BackendContract):
    def make(
        self,
        learner: LearnerConfig | None = None,
        loss: LossConfig | None = None,
        *,
        temperature: float = 1.0,
    ) -> Backend:
        settings = TorchSettings(learner or learner_config(), loss or LossConfig(), temperature)
        return TorchBackend(tiny_moe(initializer_range=0.02), settings)


# -- published format --------------------------------------------------------------------------


def published_names(layers: int, experts: int, *, tied: bool) -> set[str]:
    """Tensor names of a Qwen3-MoE checkpoint on the hub, which vLLM's loader maps."""
    names = {"model.embed_tokens.weight", "model.norm.weight"}
    names |= set() if tied else {"lm_head.weight"}
    for layer in (f"model.layers.{number}" for number in range(layers)):
        names |= {f"{layer}.self_attn.{one}_proj.weight" for one in "qkvo"}
        names |= {f"{layer}.self_attn.{one}_norm.weight" for one in "qk"}
        names |= {f"{layer}.input_layernorm.weight", f"{layer}.post_attention_layernorm.weight"}
        names.add(f"{layer}.mlp.gate.weight")
        for expert in range(experts):
            names |= {
                f"{layer}.mlp.experts.{expert}.{one}_proj.weight" for one in ("gate", "up", "down")
            }
    return names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_published_folder_has_the_checkpoints_names_and_loads_bit_equal(
    tmp_path: Path, tied: bool, dtype: torch.dtype
) -> None:
    backend = backend_of(tiny_moe(tied=tied), dtype=dtype)
    backend.train_batch(toy_batch())
    backend.save_hf(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors.keys() == published_names(2, 4, tied=tied)
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    master = dict(backend.model.named_parameters())
    fused = master["model.layers.1.mlp.experts.gate_up_proj"].detach().to(dtype)
    down = master["model.layers.1.mlp.experts.down_proj"].detach().to(dtype)
    for expert in range(4):
        prefix = f"model.layers.1.mlp.experts.{expert}"
        assert torch.equal(tensors[f"{prefix}.gate_proj.weight"], fused[expert, :32])
        assert torch.equal(tensors[f"{prefix}.up_proj.weight"], fused[expert, 32:])
        assert torch.equal(tensors[f"{prefix}.down_proj.weight"], down[expert])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    again = dict(loaded.named_parameters())
    assert again.keys() == master.keys()
    assert all(torch.equal(again[name], master[name].detach().to(dtype)) for name in master)
    assert loaded.config.tie_word_embeddings is tied


@pytest.mark.parametrize("tied", [True, False])
def test_a_dense_tied_model_is_published_once_in_bfloat16_too(tmp_path: Path, tied: bool) -> None:
    backend = backend_of(tiny_model(tied=tied), dtype=torch.bfloat16)
    backend.save_hf(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in tensors) is not tied
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16  # what an engine takes that is told nothing else


def test_the_manifest_lists_the_files_tensors(tmp_path: Path) -> None:
    backend_of(tiny_moe(), dtype=torch.bfloat16).save_hf(tmp_path)
    listed = {one.name: one for one in tensor_infos(tmp_path / "model.safetensors")}
    assert listed.keys() == published_names(2, 4, tied=True)
    assert tuple(listed["model.layers.0.mlp.experts.3.up_proj.weight"].shape) == (32, 32)


# -- routers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "beside", "expected"),
    [
        ("model.layers.0.mlp.gate.weight", "model.layers.0.mlp.experts.down_proj", True),
        ("mlp.gate.e_score_correction_bias", "mlp.experts.down_proj", True),
        ("mlp.moe_statics.e_score_correction_bias", "mlp.experts.0.up_proj.weight", True),
        ("mlp.gate.expert_bias", "mlp.experts.0.up_proj.weight", True),
        ("block_sparse_moe.router.layer.weight", "block_sparse_moe.input_linear.weight", True),
        ("feed_forward.router.weight", "feed_forward.experts.gate_up_proj", True),
        ("mlp.router.bias", "mlp.experts.gate_up_proj_bias", True),
        ("mlp.gate_proj.weight", "mlp.up_proj.weight", False),
        ("mlp.shared_expert_gate.weight", "mlp.experts.down_proj", False),
        ("mlp.experts.3.gate_proj.weight", "mlp.gate.weight", False),
        ("self_attn.gate.weight", "mlp.experts.down_proj", False),
    ],
)
def test_routers_are_told_from_other_gates(name: str, beside: str, expected: bool) -> None:
    assert (name in router_parameters([name, beside])) is expected


def test_a_frozen_router_is_not_trained_but_saved_and_published(tmp_path: Path) -> None:
    learner = learner_config(freeze_router="all", lr=1e-2, weight_decay=0.1)
    backend = backend_of(tiny_moe(), learner=learner)
    before = {name: tensor.clone() for name, tensor in backend.state_dict().items()}
    backend.train_batch(toy_batch())
    after = backend.state_dict()
    model = {name for name in before if name.startswith("model.")}
    routers = {f"model.model.layers.{layer}.mlp.gate.weight" for layer in (0, 1)}
    assert {name for name in model if torch.equal(before[name], after[name])} == routers
    assert not any(name.startswith("optim.") and ".gate." in name for name in after)
    backend.save_hf(tmp_path)
    assert "model.layers.0.mlp.gate.weight" in load_file(tmp_path / "model.safetensors")
    other = backend_of(tiny_moe(seed=7), learner=learner)
    restore(other, {name: tensor.clone() for name, tensor in after.items()})
    assert weights_equal(dict(after), other.state_dict())
    assert other.train_batch(toy_batch(step=1)).loss == backend.train_batch(toy_batch(step=1)).loss


def test_only_the_bias_is_frozen_where_there_is_one() -> None:
    model = tiny_moe()
    gate = model.model.layers[0].mlp.gate
    gate.register_parameter("e_score_correction_bias", torch.nn.Parameter(torch.zeros(4)))
    assert freeze_routers(model, "bias") == ["model.layers.0.mlp.gate.e_score_correction_bias"]
    assert gate.weight.requires_grad
    assert not gate.e_score_correction_bias.requires_grad


@pytest.mark.parametrize(
    ("model", "what", "reason"),
    [(tiny_moe, "bias", "its routers have no bias"), (tiny_model, "all", "has no router")],
)
def test_freezing_nothing_is_said(model: Any, what: Any, reason: str) -> None:
    made = model()
    with structlog.testing.capture_logs() as logs:
        assert freeze_routers(made, what) == []
    assert [log["log_level"] for log in logs] == ["warning"]
    assert reason in logs[0]["event"]
    assert all(parameter.requires_grad for parameter in made.parameters())


# -- head --------------------------------------------------------------------------------------


def test_float32_head_rounds_its_inputs_but_not_the_logits() -> None:
    model = tiny_model(tied=False)
    use_float32_head(model, torch.bfloat16)
    hidden = torch.randn((5, 32), generator=torch.Generator().manual_seed(1))
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = head(hidden)
    assert logits.dtype == torch.float32
    left = hidden.bfloat16().double().numpy()
    expected = left @ head.weight.detach().bfloat16().double().numpy().T
    np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tied", [True, False])
def test_float32_head_is_nearer_to_the_engine_and_still_trains(tied: bool) -> None:
    batch = toy_batch()
    plain = backend_of(tiny_moe(tied=tied), dtype=torch.bfloat16)
    exact = backend_of(tiny_moe(tied=tied), dtype=torch.bfloat16, head_dtype="float32")
    errors = []
    for backend in (plain, exact):
        model: Any = backend.model
        one = scored(batch)[-1]
        ids = torch.tensor([one.prompt_ids + one.token_ids])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[0]
        weight = model.get_output_embeddings().weight.detach()
        logits = hidden.bfloat16().double() @ weight.bfloat16().double().T  # as vLLM's fp32 head
        first = len(one.prompt_ids) - 1
        places = torch.arange(first, first + len(one.token_ids))
        wanted = logits.log_softmax(-1)[places, torch.tensor(one.token_ids)]
        got = torch.from_numpy(backend.logprobs([one], temperature=1.0)[0])
        errors.append(float((got - wanted).abs().max()))
    assert errors[1] < 1e-5 < errors[0]
    before = {name: tensor.clone() for name, tensor in exact.state_dict().items()}
    exact.train_batch(batch)
    after = exact.state_dict()
    name = "model.model.embed_tokens.weight" if tied else "model.lm_head.weight"
    assert not torch.equal(before[name], after[name])
    assert before.keys() <= after.keys()  # the head's parameter kept its name


# -- fused experts under autocast --------------------------------------------------------------


def test_experts_follow_autocast_and_are_untouched_without_it() -> None:
    stock, ours = tiny_moe().eval(), tiny_moe().eval()
    assert use_autocast_experts(ours)
    ids = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    plain = stock(input_ids=ids).logits
    assert torch.equal(ours(input_ids=ids).logits, plain)
    block = ours.model.layers[0].mlp.experts
    hidden = torch.randn((6, 32), generator=torch.Generator().manual_seed(2))
    index = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [0, 2], [1, 3]])
    with torch.autocast("cpu", torch.bfloat16):
        output = block(hidden, index, torch.full((6, 2), 0.5))
    expected = torch.zeros(6, 32)
    gate_up, down = block.gate_up_proj.bfloat16(), block.down_proj.bfloat16()
    for token, chosen in enumerate(index.tolist()):
        for expert in chosen:
            gate, up = functional.linear(hidden[token].bfloat16(), gate_up[expert]).chunk(2)
            part = functional.linear(functional.silu(gate) * up, down[expert])
            expected[token] += 0.5 * part.float()
    torch.testing.assert_close(output.float(), expected.detach(), rtol=2e-2, atol=2e-2)
    assert not torch.allclose(output.float(), block(hidden, index, torch.full((6, 2), 0.5)), 1e-4)
    output.float().sum().backward()
    assert block.gate_up_proj.grad.dtype == torch.float32
    assert float(block.down_proj.grad.abs().max()) > 0


def test_a_dense_model_has_no_fused_experts() -> None:
    assert not use_autocast_experts(tiny_model())


# -- device ------------------------------------------------------------------------------------


def test_devices_by_name() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    auto = resolve_device("auto")
    assert auto.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_device_that_is_not_there_is_explained() -> None:
    with pytest.raises(ConfigError, match=r"learner\.device = 'cuda:63'.*CUDA_VISIBLE_DEVICES"):
        resolve_device("cuda:63")
