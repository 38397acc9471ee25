"""DeepSpeed on one rank: the contract, and the numbers of the torch engine."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from learner.backends import zero_engine
from learner.backends.base import Backend
from learner.backends.torch_backend import TorchBackend
from learner.batch import BatchItem
from ringasync.config.schema import LearnerConfig, LossConfig
from ringasync.errors import CheckpointError, ConfigError, TrainingError

from .backend_contract import BackendContract, learner_config
from .checkpoint_kit import restore, snapshot
from .deepspeed_contract import CASES, RELATIVE, STAGES, agrees_with_torch, zero
from .kit import batch_of, toy_batch, trajectory
from .ranks_contract import close
from .ranks_kit import build, leave_group, spec_of

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


@pytest.fixture(autouse=True, scope="module")
def _alone() -> Iterator[None]:
    yield
    leave_group()


class _Contract(BackendContract):
    learner: ClassVar[dict[str, object]]

    def make(
        self,
        learner: LearnerConfig | None = None,
        loss: LossConfig | None = None,
        *,
        temperature: float = 1.0,
    ) -> Backend:
        learner = (learner or learner_config()).model_copy(update=self.learner)
        return build(spec_of(learner, loss, temperature=temperature))


class TestZero0(_Contract):
    learner: ClassVar[dict[str, object]] = zero(0)


class TestZero1(_Contract):
    learner: ClassVar[dict[str, object]] = zero(1)


class TestZero2(_Contract):
    learner: ClassVar[dict[str, object]] = zero(2)


class TestZero3(_Contract):
    learner: ClassVar[dict[str, object]] = zero(3)


class TestZero1Offloaded(_Contract):
    learner: ClassVar[dict[str, object]] = zero(1, offload_optimizer=True)


def _engine(spec: dict[str, Any]) -> tuple[TorchBackend, TorchBackend]:
    made = build(spec)
    return made, made


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "case", ["accumulation, clipping, two updates", "chunks and layers computed again", "routers"]
)
def test_losses_gradients_and_weights_are_those_of_torch(case: str, stage: int) -> None:
    agrees_with_torch(CASES[case], stage, _engine)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default")  # of the compiler's own making
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_compiled_layers_give_the_same_numbers(stage: int) -> None:
    case = {"learner": {"microbatch_tokens": 48, "compile": True}, "count": 9}
    agrees_with_torch(case, stage, _engine)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_offloaded_optimizer_gives_the_same_numbers(stage: int) -> None:
    case = CASES["accumulation, clipping, two updates"]
    agrees_with_torch(case, stage, _engine, offload_optimizer=True)


@pytest.mark.parametrize("stage", STAGES)
def test_each_engine_goes_on_from_the_others_checkpoint(stage: int) -> None:
    alone = build(spec_of(learner_config(warmup_steps=3, adam_eps=1e-4)))
    expected = [alone.train_batch(toy_batch(step=step)).loss for step in range(3)]
    kinds = [zero(stage), {}, zero((stage + 1) % 4)]
    found, state = [], None
    for step, kind in enumerate(kinds):
        backend = build(spec_of(learner_config(warmup_steps=3, adam_eps=1e-4, **kind)))
        if state is not None:
            restore(backend, state)
        found.append(backend.train_batch(toy_batch(step=step)).loss)
        state = snapshot(backend)
    assert found == pytest.approx(expected, rel=RELATIVE)
    assert state is not None
    whole = snapshot(alone)
    assert state.keys() == whole.keys()
    for name in whole:
        if name.startswith(("model.", "optim.")):
            close(state[name], whole[name], RELATIVE)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_infinite_gradient_is_no_step_and_leaves_nothing_behind(stage: int, offload: bool) -> None:
    if offload and stage == 0:
        return
    spec = spec_of(learner_config(**zero(stage, offload_optimizer=offload)))
    backend, other = build(spec), build(spec)
    before = snapshot(backend)
    bad = batch_of([BatchItem(trajectory("g.0", 4), float("inf"), 4)])
    with pytest.raises(TrainingError, match="gradient norm"):
        backend.train_batch(bad)
    after = snapshot(backend)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert backend.train_batch(toy_batch()).grad_norm == other.train_batch(toy_batch()).grad_norm


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_of_a_refused_batch_are_gone(stage: int, offload: bool) -> None:
    if offload and stage == 0:
        return
    spec = spec_of(learner_config(**zero(stage, offload_optimizer=offload)))
    backend, other = build(spec), build(spec)

    def refuse(_lr: float) -> float:
        backend._drop_gradients()
        return 0.0

    backend.__dict__["_step"] = refuse
    for step in (7, 8):
        backend.train_batch(toy_batch(step=step))
    del backend.__dict__["_step"]
    one, two = backend.train_batch(toy_batch()), other.train_batch(toy_batch())
    assert (one.loss, one.grad_norm) == (two.loss, two.grad_norm)


def test_parameters_that_were_stepped_differently_often_are_refused() -> None:
    backend = build(spec_of(learner_config(**zero(1))))
    backend.train_batch(toy_batch())
    before = snapshot(backend)
    odd = next(name for name in before if name.endswith(".step"))
    with pytest.raises(CheckpointError, match=r"set learner\.backend = 'torch'"):
        restore(backend, {**before, odd: before[odd] + 1})
    after = snapshot(backend)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_export_is_that_of_torch(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for model in ("tied", "moe"):
        build(spec_of(model=model, dtype="bfloat16")).save_hf(tmp_path / f"{model}-torch")
        expected = load_file(tmp_path / f"{model}-torch/model.safetensors")
        for stage in (2, 3):
            folder = tmp_path / f"{model}-{stage}"
            learner = learner_config(**zero(stage))
            build(spec_of(learner, model=model, dtype="bfloat16")).save_hf(folder)
            found = load_file(folder / "model.safetensors")
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_stage_3_leaves_no_matrix_whole_between_forwards() -> None:
    backend = build(spec_of(learner_config(**zero(3))))
    backend.train_batch(toy_batch())
    matrices = [one for one in backend.model.parameters() if one.ds_shape.numel() > 100]  # type: ignore[attr-defined]
    assert matrices
    assert all(one.numel() == 0 for one in matrices)


def test_a_missing_package_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero_engine, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"install ringasync\[deepspeed\]"):
        build(spec_of(learner_config(**zero(1))))
