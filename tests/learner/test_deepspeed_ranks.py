"""DeepSpeed on two ranks: the contract, the numbers of one rank, checkpoints of other ranks."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from learner.backends.torch_backend import TorchBackend
from ringasync.errors import CheckpointError

from .backend_contract import learner_config
from .deepspeed_contract import CASES, ON_GPU, RELATIVE, STAGES, agrees_with_torch, zero
from .kit import toy_batch
from .ranks_contract import ContractOnTwoRanks
from .ranks_kit import RANKS, TwoRanks, build, spec_of, two_ranks

pytestmark = [
    pytest.mark.timeout(240),  # of the first engine: it imports DeepSpeed, on both ranks
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
    ),
    pytest.mark.skipif(
        ON_GPU and torch.cuda.device_count() < RANKS, reason="a GPU for each rank, or none at all"
    ),
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoRanks]:
    with two_ranks(tmp_path_factory.mktemp("ranks"), "cuda" if ON_GPU else "cpu") as made:
        yield made


class TestZero0(ContractOnTwoRanks):
    engine = zero(0)


class TestZero1(ContractOnTwoRanks):
    engine = zero(1)


class TestZero2(ContractOnTwoRanks):
    engine = zero(2)


class TestZero3(ContractOnTwoRanks):
    engine = zero(3)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_losses_gradients_and_weights_are_those_of_torch(
    ranks: TwoRanks, case: dict[str, Any], stage: int
) -> None:
    def make(spec: dict[str, Any]) -> tuple[Any, TorchBackend]:
        made = ranks.make(spec, keeps_gradients=True)
        return made, made.local

    agrees_with_torch(case, stage, make)


def test_checkpoints_of_all_engines_and_stages_go_on_as_each_other(
    ranks: TwoRanks, tmp_path: Path
) -> None:
    alone = build(spec_of(learner_config(microbatch_tokens=48)))
    kinds = [zero(3), zero(1), {}, zero(0), zero(2), zero(3, offload_optimizer=True), zero(1)]
    expected = [alone.train_batch(toy_batch(step=step)).loss for step in range(len(kinds))]
    found = []
    for step, kind in enumerate(kinds):
        both = ranks.make(spec_of(learner_config(microbatch_tokens=48, **kind)))
        if step:
            both.load(tmp_path / str(step - 1))
        found.append(both.train_batch(toy_batch(step=step)).loss)
        both.begin_save(tmp_path / str(step)).result()
    assert found == pytest.approx(expected, rel=RELATIVE)
    for step, kind in enumerate(kinds):
        again = build(spec_of(learner_config(microbatch_tokens=48)))  # one rank, torch
        again.load(tmp_path / str(step))
        assert again.updates == step + 1
        if step + 1 < len(expected):
            loss = again.train_batch(toy_batch(step=step + 1)).loss
            assert loss == pytest.approx(expected[step + 1], rel=RELATIVE)
        shards = [one.stat().st_size for one in (tmp_path / str(step)).glob("*.distcp")]
        if kind.get("zero_stage") != 0:
            assert len(shards) == RANKS
            assert max(shards) < 0.8 * sum(shards)  # each rank wrote its part


def test_a_checkpoint_of_another_model_changes_nothing_on_any_rank(
    ranks: TwoRanks, tmp_path: Path
) -> None:
    build(spec_of(model="untied")).begin_save(tmp_path / "untied").result()
    (tmp_path / "damaged").mkdir()
    both, again = (ranks.make(spec_of(learner_config(**zero(3)))) for _ in range(2))
    for name in ("untied", "damaged"):
        with pytest.raises(CheckpointError):
            both.load(tmp_path / name)
    assert again.train_batch(toy_batch()).loss == both.train_batch(toy_batch()).loss
