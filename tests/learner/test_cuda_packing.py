"""Packed attention and prepared layers on a CUDA device; skipped where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from learner.backends import flash4
from learner.backends.collate import collate
from learner.backends.extra_terms import TermTotals
from learner.backends.packing import Packing, choose_packing, packed_attention
from learner.backends.step_timer import StepTimer
from learner.backends.torch_backend import TorchBackend, TorchSettings
from ringasync.config.schema import LossConfig

from .backend_contract import learner_config
from .kit import tiny_model, toy_batch
from .test_packing import check_same_step
from .test_token_scores import CHUNK, small, stepped

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

LENGTHS = (1, 700, 64, 129, 300)
LOSS = LossConfig(mismatch="none")


def attend(attention: str, dtype: torch.dtype, heads: int, kv_heads: int) -> list[Tensor]:
    """Output and gradients of q, k, v in float32, from the same numbers each time."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(1, count, sum(LENGTHS), 64, device="cuda", generator=generator)
        .to(torch.bfloat16)
        .to(dtype)
        .requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    )
    packing = Packing.of(LENGTHS, attention).to(torch.device("cuda"))  # type: ignore[arg-type]
    output, _ = packed_attention(
        nn.Module(), q, k, v, None, 64**-0.5, 0.0, packing.bounds, max(LENGTHS)
    )
    weights = torch.randn(output.shape, device="cuda", generator=generator)
    (output.float() * weights).sum().backward()  # type: ignore[no-untyped-call]
    return [output.float(), *(one.grad.float() for one in (q, k, v) if one.grad is not None)]


def test_heads_that_the_kernel_refuses_are_attended_sequence_by_sequence() -> None:
    cuda = torch.device("cuda")
    model = small("qwen3", head_dim=320).to(cuda)  # FlashAttention ends at 256
    assert choose_packing(model, "auto", cuda, torch.bfloat16, "torch") == "sequences"


@pytest.fixture(params=["torch", "flash4"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """The setting, where it can be had; torch's own afterwards."""
    if request.param == "flash4" and not flash4.installed():
        pytest.skip("flash-attn-4 is not installed")
    model = small("qwen3", head_dim=64)
    cuda = torch.device("cuda")
    assert choose_packing(model.to(cuda), "auto", cuda, torch.bfloat16, request.param) == "varlen"
    assert flash4.is_used() == (request.param == "flash4")
    yield request.param
    choose_packing(model, "auto", cuda, torch.bfloat16, "torch")
    assert not flash4.is_used()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2)])
def test_varlen_is_attention_of_each_sequence(kernel: str, heads: int, kv_heads: int) -> None:
    exact = attend("sequences", torch.float32, heads, kv_heads)
    found = attend("varlen", torch.bfloat16, heads, kv_heads)
    for one, other in zip(found, exact, strict=True):
        assert float((one - other).norm() / other.norm()) < 0.01


@pytest.mark.skipif(not flash4.installed(), reason="flash-attn-4 is not installed")
@pytest.mark.parametrize(("off", "said"), [(0.03, "off by 3.0e-02"), (float("nan"), "nan")])
def test_a_kernel_with_other_numbers_is_not_used(off: float, said: str) -> None:
    assert said in flash4.use_flash4(True, torch.device("cuda"), lambda: off)
    assert not flash4.is_used()


@pytest.mark.skipif(not flash4.installed(), reason="flash-attn-4 is not installed")
def test_a_kernel_that_fails_is_not_used() -> None:
    def fail() -> float:
        raise RuntimeError("no such head")

    assert "no such head" in flash4.use_flash4(True, torch.device("cuda"), fail)
    assert not flash4.is_used()


@pytest.mark.parametrize("packing", ["auto", "sequences"])
def test_a_packed_step_in_bfloat16_is_the_padded_one_but_for_rounding(packing: str) -> None:
    found = [
        stepped(
            small("qwen3", head_dim=32),
            toy_batch(),
            CHUNK,
            loss=LOSS,
            dtype=torch.bfloat16,
            learner={"device": "cuda", "packing": layout, "microbatch_tokens": 60},
        )
        for layout in (packing, "off")
    ]
    layouts = [backend._packing for *_, backend in found]
    assert layouts == ["varlen" if packing == "auto" else "sequences", None]
    (one, gradients, _), (other, expected, _) = found
    assert one.loss == pytest.approx(other.loss, rel=1e-4)  # r = 1: exact but for the sum
    assert one.grad_norm == pytest.approx(other.grad_norm, rel=0.03)
    for name, gradient in gradients.items():
        assert float((gradient - expected[name]).norm()) < 0.1 * other.grad_norm, name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_packed_step_in_float32_is_the_padded_one(checkpointing: bool) -> None:
    packed, padded = (
        stepped(
            tiny_model(),
            toy_batch(),
            CHUNK,
            loss=LOSS,
            learner={
                "device": "cuda",
                "packing": layout,
                "activation_checkpointing": checkpointing,
            },
        )
        for layout in ("auto", "off")
    )
    assert packed[2]._packing == "sequences"
    check_same_step(packed, padded)


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("default")  # of the compiler's own making
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_make_the_same_step_but_for_rounding(checkpointing: bool) -> None:
    compiled, plain = (
        stepped(
            small("qwen3", head_dim=32),
            toy_batch(),
            CHUNK,
            loss=LOSS,
            dtype=torch.bfloat16,
            learner={
                "device": "cuda",
                "compile": on,
                "activation_checkpointing": checkpointing and on,
                "microbatch_tokens": 60,
            },
        )
        for on in (True, False)
    )
    assert compiled[0].loss == pytest.approx(plain[0].loss, rel=1e-4)
    assert compiled[0].grad_norm == pytest.approx(plain[0].grad_norm, rel=0.03)


def test_no_micro_batch_waits_for_the_device() -> None:
    settings = TorchSettings(
        learner_config(device="cuda", logprob_chunk_tokens=CHUNK), LOSS, dtype=torch.bfloat16
    )
    backend = TorchBackend(small("qwen3", head_dim=32), settings)
    backend.train_batch(toy_batch())  # the first one may load kernels
    device = torch.device("cuda")
    micros = [
        micro.to(device)
        for micro in collate(
            toy_batch(), microbatch_tokens=60, normalizer="budget", packing=backend._packing
        )
    ]
    assert len(micros) > 1
    fixed = backend._terms.prepare_batch(micros, 1.0)
    timer = StepTimer(device)
    totals = TermTotals(lambda: torch.zeros((), dtype=torch.float64, device=device))
    torch.cuda.set_sync_debug_mode("error")
    try:
        done = [
            backend._accumulation.add(micro, None, one, totals, timer, is_last=micro is micros[-1])
            for micro, one in zip(micros, fixed, strict=True)
        ]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trained = [one.stats() for one in done]
    assert sum(one.num_tokens for one in trained) == toy_batch().trained_tokens
    assert np.isfinite(sum(float(one.loss) for one in done))


def test_fused_moments_go_to_a_cpu_and_back() -> None:
    on_device = TorchBackend(tiny_model(), TorchSettings(learner_config(device="cuda"), LOSS))
    on_device.train_batch(toy_batch())
    on_device.offload()
    on_device.onload()
    steps = [one["step"] for one in on_device._optimizer.state.values()]
    assert {step.device.type for step in steps} == {"cuda"}
    assert {float(step) for step in steps} == {1.0}
    later = replace(toy_batch(step=1), batch_id="later")
    assert np.isfinite(on_device.train_batch(later).loss)
