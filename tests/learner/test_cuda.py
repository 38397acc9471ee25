"""The train engine and the starter on a CUDA device; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from learner.backends.torch_backend import TorchBackend, TorchSettings
from learner.starter import ensure_starter
from ringasync.config.schema import Config, LearnerConfig, LossConfig, StarterConfig

from .backend_contract import BackendContract, learner_config, scored
from .checkpoint_kit import restore, snapshot
from .kit import toy_batch
from .moe_kit import tiny_moe
from .test_starter_model import config_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def backend_on(device: str, **changes: object) -> TorchBackend:
    settings = TorchSettings(learner_config(device=device), LossConfig(), **changes)  # type: ignore[arg-type]
    return TorchBackend(tiny_moe(), settings)


class TestCudaMoeBackend(BackendContract):
    def make(
        self,
        learner: LearnerConfig | None = None,
        loss: LossConfig | None = None,
        *,
        temperature: float = 1.0,
    ) -> TorchBackend:
        settings = TorchSettings(learner or learner_config(), loss or LossConfig(), temperature)
        return TorchBackend(tiny_moe(initializer_range=0.02), settings)


def test_cuda_and_cpu_agree_in_float32() -> None:
    one, other = backend_on("cuda"), backend_on("cpu")
    assert next(one.model.parameters()).is_cuda
    for left, right in zip(
        one.logprobs(scored(toy_batch()), temperature=1.0),
        other.logprobs(scored(toy_batch()), temperature=1.0),
        strict=True,
    ):
        np.testing.assert_allclose(left, right, atol=1e-4)
    assert one.train_batch(toy_batch()).loss == pytest.approx(
        other.train_batch(toy_batch()).loss, rel=1e-3
    )


def test_a_checkpoint_of_cuda_goes_on_on_the_cpu() -> None:
    one = backend_on("cuda")
    one.train_batch(toy_batch())
    state = {name: tensor.cpu() for name, tensor in snapshot(one).items()}
    other = backend_on("cpu")
    restore(other, state)
    assert other.train_batch(toy_batch(step=1)).loss == pytest.approx(
        one.train_batch(toy_batch(step=1)).loss, rel=1e-3
    )


def test_a_save_is_staged_in_pinned_memory_that_the_next_one_uses(tmp_path: Path) -> None:
    backend = backend_on("cuda")
    backend.train_batch(toy_batch())
    backend.begin_save(tmp_path / "first").result()
    held = dict(backend._saver._memory._buffers)
    on_device = {name for name, tensor in backend.state_dict().items() if tensor.is_cuda}
    assert {name for name, tensor in held.items() if tensor.is_pinned()} == on_device
    backend.begin_save(tmp_path / "second").result()
    assert all(backend._saver._memory._buffers[name] is tensor for name, tensor in held.items())


@pytest.mark.parametrize("head_dtype", ["model", "float32"])
def test_bfloat16_on_cuda_is_near_float32(head_dtype: str, tmp_path: Path) -> None:
    low = backend_on("cuda", dtype=torch.bfloat16, head_dtype=head_dtype)
    exact = backend_on("cuda")
    batch = scored(toy_batch())
    gaps = [
        float(np.abs(left - right).mean())
        for left, right in zip(
            low.logprobs(batch, temperature=1.0),
            exact.logprobs(batch, temperature=1.0),
            strict=True,
        )
    ]
    assert max(gaps) < 0.2  # a token may change its expert, so single ones may be further off
    assert np.isfinite(low.train_batch(toy_batch()).grad_norm)
    low.save_hf(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


def test_an_offloaded_learner_leaves_next_to_nothing_on_the_device(tmp_path: Path) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    backend, stays = backend_on("cuda", begin_offloaded=True), backend_on("cpu")
    assert torch.cuda.memory_reserved() == before
    backend.onload()
    held = backend_on("cuda")
    for step in range(2):
        batch = toy_batch(step=step)
        assert backend.train_batch(batch).loss == held.train_batch(batch).loss
        on_device = torch.cuda.memory_allocated()
        backend.offload()
        moved = sum(t.nbytes for n, t in backend.state_dict().items() if n[:4] in ("mode", "opti"))
        assert on_device - torch.cuda.memory_allocated() > 0.9 * moved
        backend.save_hf(tmp_path / str(step))
        backend.onload()
    del held
    backend.offload()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() < 1 << 20
    restore(stays, {n: t.cpu() for n, t in snapshot(backend).items()})


@pytest.mark.timeout(600)
@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe"])
def test_starter_is_built_on_cuda(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RINGASYNC_CACHE", str(tmp_path))
    base = config_of()
    changes = {
        "architecture": architecture,
        "device": "cuda",
        "steps": 60,
        "warmup_steps": 5,
        "data_workers": 2,
    }
    starter = StarterConfig(**{**base.starter.model_dump(), **changes})
    losses: list[float] = []
    config: Config = base.model_copy(update={"starter": starter})
    folder = ensure_starter(config, lambda _step, loss: losses.append(loss))
    assert len(losses) == 60
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
    assert (folder / "model.safetensors").is_file()


def test_extra_loss_terms_agree_with_the_cpu_and_leave_the_device() -> None:
    coefficients = {"kl_coef": 0.5, "entropy_coef": 0.1, "router_balance_coef": 0.1}
    loss = LossConfig.model_validate({"mismatch": "none", "router_z_coef": 0.1, **coefficients})
    results = []
    for device in ("cuda", "cpu"):
        # Another policy than the reference, and routers whose choice rounding does not turn.
        backend = TorchBackend(tiny_moe(), TorchSettings(learner_config(device=device), loss))
        backend.model.load_state_dict(tiny_moe(seed=1).state_dict())
        results.append(backend.train_batch(toy_batch()))
        reference = backend._terms._reference
        assert reference is not None
        backend.offload()
        assert {one.device.type for one in reference._model.parameters()} == {"cpu"}
        backend.onload()
        assert {one.device.type for one in reference._model.parameters()} == {device}
    assert results[0].terms == pytest.approx(results[1].terms, rel=1e-3)
