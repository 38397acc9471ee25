"""The starter's networks, its optimizers and its data processes; tiny models, real tasks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from learner import starter_training
from learner.backends.torch_backend import TorchBackend, TorchSettings
from learner.starter import ensure_starter, starter_key
from learner.starter_model import StackedMuon, build_model, build_optimizers, orthogonalize
from learner.starter_tokenizer import build_tokenizer
from learner.starter_training import Examples, Packer
from ringasync.config.schema import Config, DataConfig, LossConfig, StarterConfig, TaskConfig

from .backend_contract import learner_config
from .kit import toy_batch

SUMS = TaskConfig(
    name="sums",
    kind="reasoning_gym",
    dataset="chain_sum",
    params={"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 1},
    compact=True,
    answer_mark="=",
)
TINY_MOE: dict[str, Any] = {
    "architecture": "qwen3_moe",
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 1,
    "num_kv_heads": 1,
    "num_experts": 4,
    "experts_per_token": 2,
    "moe_intermediate_size": 32,
    "steps": 2,
    "rows": 4,
    "row_tokens": 48,
    "threads": 1,
}


def config_of(**starter: Any) -> Config:
    data = DataConfig(tasks=(SUMS,), template="<user>{prompt}<assistant>")
    return Config(data=data, starter=StarterConfig(**{**TINY_MOE, **starter}))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RINGASYNC_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# -- Muon --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(16, 8), (8, 16), (12, 12)])
@pytest.mark.parametrize("parts", [1, 2])
def test_stacked_muon_is_muon_matrix_by_matrix(height: int, width: int, parts: int) -> None:
    generator = torch.Generator().manual_seed(1)
    start = torch.randn((3, parts * height, width), generator=generator)
    stack = torch.nn.Parameter(start.clone())
    singles = [torch.nn.Parameter(each.clone()) for each in start.reshape(-1, height, width)]
    mine = StackedMuon([(stack, parts)], lr=0.02, momentum=0.95)
    theirs = torch.optim.Muon(singles, lr=0.02, momentum=0.95, weight_decay=0.0)
    for _ in range(3):
        gradient = torch.randn(start.shape, generator=generator)
        stack.grad = gradient.clone()
        for single, part in zip(singles, gradient.reshape(-1, height, width), strict=True):
            single.grad = part.clone()
        mine.step()
        theirs.step()  # type: ignore[no-untyped-call]
    found = stack.detach().reshape(-1, height, width)
    expected = torch.stack([each.detach() for each in singles])
    # torch iterates in bfloat16 (8 bits): 0.02 x 3 steps x 2**-8, and some amplification.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
    assert float((found - start.reshape(found.shape)).abs().max()) > 0.02


def test_orthogonalized_singular_values_are_near_one() -> None:
    matrices = torch.randn((4, 24, 8), generator=torch.Generator().manual_seed(2))
    values = torch.linalg.svdvals(orthogonalize(matrices).float())
    assert 0.6 < float(values.min()) < float(values.max()) < 1.3


def test_experts_without_tokens_do_not_move() -> None:
    stack = torch.nn.Parameter(torch.ones(2, 4, 4))
    stack.grad = torch.zeros(2, 4, 4)
    stack.grad[1] = torch.eye(4)
    StackedMuon([(stack, 1)], lr=0.1, momentum=0.95).step()
    assert torch.equal(stack.detach()[0], torch.ones(4, 4))
    assert not torch.equal(stack.detach()[1], torch.ones(4, 4))


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe"])
def test_every_parameter_has_one_optimizer(architecture: str) -> None:
    settings = StarterConfig(**{**TINY_MOE, "architecture": architecture})
    model = build_model(settings, 40, 64)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [
        {names[parameter] for group in optimizer.param_groups for parameter in group["params"]}
        for optimizer in build_optimizers(model, settings)
    ]
    assert sum(len(group) for group in groups) == len(names)
    assert set.union(*groups) == set(names.values())
    by_adam = groups[0]
    assert "model.embed_tokens.weight" in by_adam
    assert "model.layers.0.input_layernorm.weight" in by_adam
    assert ("model.layers.0.mlp.gate.weight" in by_adam) is (architecture == "qwen3_moe")
    if architecture == "qwen3_moe":
        assert groups[1] >= {
            f"model.layers.{layer}.mlp.experts.{one}"
            for layer in (0, 1)
            for one in ("gate_up_proj", "down_proj")
        }
    assert "model.layers.0.self_attn.q_proj.weight" in groups[1]


# -- model and loss ----------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_moe_starter_loads_trains_and_publishes(tied: bool, tmp_path: Path) -> None:
    folder = ensure_starter(config_of(tie_word_embeddings=tied))
    assert folder.name.startswith("qwen3_moe-")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.model_type == "qwen3_moe"
    assert (model.config.num_experts, model.config.num_experts_per_tok) == (4, 2)
    assert model.config.norm_topk_prob is True
    tensors = load_file(folder / "model.safetensors")
    assert tuple(tensors["model.layers.1.mlp.experts.3.down_proj.weight"].shape) == (32, 32)
    assert ("lm_head.weight" in tensors) is not tied
    backend = TorchBackend.from_pretrained(
        str(folder), TorchSettings(learner_config(), LossConfig(), dtype=torch.bfloat16)
    )
    backend.train_batch(toy_batch())
    backend.save_hf(tmp_path / "published")
    published = load_file(tmp_path / "published" / "model.safetensors")
    assert published.keys() == tensors.keys()
    assert (tmp_path / "published" / "tokenizer.json").is_file()


def test_moe_loss_falls_and_no_expert_is_left_out() -> None:
    losses: list[float] = []
    config = config_of(steps=60, warmup_steps=5)
    folder = ensure_starter(config, lambda _step, loss: losses.append(loss))
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = build_tokenizer()
    ids, positions, _ = Packer(iter(Examples(config, tokenizer)), 8, 48).next()
    with torch.no_grad():
        output = model.model(
            input_ids=ids, position_ids=positions, use_cache=False, output_router_logits=True
        )
    for logits in output.router_logits:
        chosen = logits[(ids != tokenizer.pad_token_id).flatten()].topk(2).indices
        share = torch.bincount(chosen.flatten(), minlength=4) / chosen.numel()
        assert float(share.min()) > 0.02  # even would be 0.25


def test_balance_loss_is_what_the_switch_paper_writes() -> None:
    settings = StarterConfig(**{**TINY_MOE, "router_aux_loss": 0.5})
    torch.manual_seed(0)
    model = build_model(settings, 102, 64)
    ids = torch.tensor([[5, 6, 7, 8, 0, 0]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 0]])
    labels = torch.tensor([[-100, 7, 8, -100, -100, -100]])
    with torch.no_grad():
        loss, balance = starter_training._loss(model, ids, positions, labels)
    assert balance is not None
    with torch.no_grad():
        output = model.model(
            input_ids=ids, position_ids=positions, use_cache=False, output_router_logits=True
        )
    # E x sum over experts of (share of assignments per token) x (mean probability), padding left
    # out; transformers takes both means over the tokens of all layers together.
    real = torch.cat([each[:4] for each in output.router_logits]).softmax(-1)
    counts = torch.bincount(real.topk(2).indices.flatten(), minlength=4) / real.shape[0]
    assert float(balance) == pytest.approx(0.5 * 4 * float((counts * real.mean(0)).sum()), rel=1e-4)
    with torch.no_grad():
        logits = model.lm_head(output.last_hidden_state[0, 1:3]).log_softmax(-1)
    expected = -(logits[0, 7] + logits[1, 8]) / 2
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)


def test_a_dense_starter_has_no_balance_loss() -> None:
    model = build_model(StarterConfig(**{**TINY_MOE, "architecture": "qwen3"}), 102, 64)
    ids = torch.tensor([[5, 6]])
    _, balance = starter_training._loss(model, ids, torch.tensor([[0, 1]]), ids)
    assert balance is None


# -- settings ----------------------------------------------------------------------------------


def test_key_follows_the_moe_settings_but_not_the_device() -> None:
    base = config_of()
    changed = [
        config_of(architecture="qwen3"),
        config_of(num_experts=8),
        config_of(experts_per_token=3),
        config_of(moe_intermediate_size=64),
        config_of(router_aux_loss=0.0),
        config_of(tie_word_embeddings=False),
    ]
    assert len({starter_key(config) for config in (base, *changed)}) == len(changed) + 1
    assert starter_key(config_of(device="cpu")) == starter_key(base)


def test_more_experts_a_token_than_there_are_is_refused() -> None:
    with pytest.raises(ValidationError, match="must not be above num_experts"):
        config_of(experts_per_token=5)
    assert config_of(architecture="qwen3", experts_per_token=5)  # without effect there


@pytest.mark.timeout(400)
def test_data_processes_share_the_problems_in_a_fixed_order() -> None:
    config = config_of(data_workers=2, steps=4)
    tokenizer = build_tokenizer()
    packers = [Packer(iter(Examples(config, tokenizer, first, 2)), 4, 48) for first in (0, 1)]
    made = list(starter_training._loader(config, tokenizer))
    assert len(made) == 4
    for step, batch in enumerate(made[:2]):  # before ``early_part`` ends
        for mine, expected in zip(batch, packers[step].next(), strict=True):
            assert torch.equal(mine, expected)
