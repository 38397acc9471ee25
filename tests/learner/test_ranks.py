"""The torch engine on two ranks: the contract, and the numbers of one rank.

On gloo, or where there is a GPU for each rank on NCCL.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from learner.backends.tensor_files import read_tensors
from ringasync.config.schema import LossConfig
from ringasync.errors import CheckpointError

from .backend_contract import learner_config
from .kit import toy_batch
from .ranked_learner import CANCELLED
from .ranks_contract import DENSE_TERMS, ROUTERS, ContractOnTwoRanks, close
from .ranks_kit import RANKS, TwoRanks, build, keep_gradients, spec_of, two_ranks

DEVICE = "cuda" if torch.cuda.device_count() >= RANKS else "cpu"
RELATIVE = 1e-5 if DEVICE == "cpu" else 1e-4
"""A GPU adds in no fixed order."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoRanks]:
    with two_ranks(tmp_path_factory.mktemp("ranks"), DEVICE) as made:
        yield made


class TestShardedTorchBackend(ContractOnTwoRanks):
    """FSDP2."""


CASES: dict[str, dict[str, Any]] = {
    "one micro-batch, a rank without any": {"learner": {"microbatch_tokens": 9999}},
    "odd number of micro-batches": {"learner": {"microbatch_tokens": 1}, "count": 5},
    "even number": {"learner": {"microbatch_tokens": 1}, "count": 6},
    "accumulation": {"learner": {"microbatch_tokens": 48}, "count": 9},
    "clipping, two updates": {
        "learner": {"microbatch_tokens": 48, "grad_clip": 0.05, "updates_per_batch": 2},
    },
    "one sequence": {"learner": {}, "count": 1},
    "untied, all logits at once": {"model": "untied", "learner": {"logprob_chunk_tokens": 0}},
    "chunks computed again": {"learner": {"logprob_chunk_tokens": 4, "microbatch_tokens": 48}},
    "checkpointed layers": {
        "learner": {"microbatch_tokens": 48, "activation_checkpointing": True},
    },
    "padded": {"learner": {"microbatch_tokens": 48, "packing": "off"}},
    "all dense terms": {
        "learner": {"microbatch_tokens": 48},
        "loss": DENSE_TERMS,
    },
    "routers": ROUTERS,
}


COMPILED: dict[str, dict[str, Any]] = {
    "packed": {"learner": {"microbatch_tokens": 48, "compile": True}, "count": 9},
    "checkpointed": {
        "learner": {"microbatch_tokens": 48, "compile": True, "activation_checkpointing": True},
    },
}


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default")  # of the compiler's own making
@pytest.mark.parametrize("case", COMPILED.values(), ids=COMPILED.keys())
def test_compiled_layers_on_shards_make_the_step_of_plain_ones_on_one_rank(
    ranks: TwoRanks, case: dict[str, Any]
) -> None:
    agrees_with_one_rank(ranks, case)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_losses_and_gradients_of_two_ranks_are_those_of_one(
    ranks: TwoRanks, case: dict[str, Any]
) -> None:
    agrees_with_one_rank(ranks, case)


def agrees_with_one_rank(ranks: TwoRanks, case: dict[str, Any]) -> None:
    """Losses, gradients and statistics, whatever the micro-batches."""
    settings = {"grad_clip": 1e9, **case["learner"]}
    spec = spec_of(
        learner_config(**settings),
        LossConfig.model_validate(case.get("loss", {})),
        temperature=0.8,
        model=case.get("model", "tied"),
    )
    # As few micro-batches as can be, whatever the two ranks have.
    whole = {**spec, "learner": {**spec["learner"], "microbatch_tokens": 9999, "compile": False}}
    alone, both = build(whole), ranks.make(spec, keeps_gradients=True)
    expected_gradients, gradients = keep_gradients(alone), keep_gradients(both.local)
    moe = case.get("model") == "moe"  # a balance is of a micro-batch: the same ones are needed
    if moe:
        alone = build(spec)
        expected_gradients = keep_gradients(alone)
    for step in range(2):
        batch = toy_batch(case.get("count", 6), step=step)
        expected, found = alone.train_batch(batch), both.train_batch(batch)
        assert found.loss == pytest.approx(expected.loss, rel=RELATIVE, abs=CANCELLED)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=RELATIVE)
        assert found.terms == pytest.approx(expected.terms, rel=RELATIVE, abs=CANCELLED)
        assert found.tokens.num_tokens == expected.tokens.num_tokens == batch.trained_tokens
        for name in ("log_ratio", "weights", "ages", "clipped", "entropy"):
            one, two = (sorted(getattr(r.tokens, name)) for r in (expected, found))
            assert two == pytest.approx(one, rel=1e-4, abs=1e-5, nan_ok=True)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        close(gradients[name], gradient, RELATIVE)


def test_a_checkpoint_of_two_ranks_goes_on_at_one_and_back(ranks: TwoRanks, tmp_path: Path) -> None:
    spec = spec_of(learner_config(microbatch_tokens=48))
    both, alone = ranks.make(spec), build(spec)
    for step in range(2):
        both.train_batch(toy_batch(step=step))
    both.begin_save(tmp_path / "of-two").result()
    alone.load(tmp_path / "of-two")
    assert alone.updates == 2
    expected = [both.train_batch(toy_batch(step=step)).loss for step in (2, 3, 4)]
    found = [alone.train_batch(toy_batch(step=step)).loss for step in (2, 3)]
    alone.begin_save(tmp_path / "of-one").result()
    again = ranks.make(spec)
    again.load(tmp_path / "of-one")
    found.append(again.train_batch(toy_batch(step=4)).loss)
    assert found == pytest.approx(expected, rel=RELATIVE)
    names = read_tensors(tmp_path / "of-two").keys()
    assert names == read_tensors(tmp_path / "of-one").keys()
    assert "model.lm_head.weight" not in names  # tied, once
    shards = [one.stat().st_size for one in (tmp_path / "of-two").glob("*.distcp")]
    assert len(shards) == 2
    assert max(shards) < 0.7 * sum(shards)  # each rank wrote its part


def test_the_export_of_two_ranks_is_that_of_one(ranks: TwoRanks, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for model in ("tied", "moe"):
        spec = spec_of(model=model, dtype="bfloat16")
        both, alone = ranks.make(spec), build(spec)
        both.save_hf(tmp_path / f"{model}-two")
        both.begin_export(tmp_path / f"{model}-beside").result()
        alone.save_hf(tmp_path / f"{model}-one")
        one, two = (load_file(tmp_path / f"{model}-{n}/model.safetensors") for n in ("one", "two"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
        for name in ("config.json", "model.safetensors"):
            waited, beside = (tmp_path / f"{model}-{way}" / name for way in ("two", "beside"))
            assert waited.read_bytes() == beside.read_bytes()
        texts = [(tmp_path / f"{model}-{n}/config.json").read_text() for n in ("one", "two")]
        assert texts[0] == texts[1]


def test_a_checkpoint_of_another_model_changes_nothing_on_any_rank(
    ranks: TwoRanks, tmp_path: Path
) -> None:
    build(spec_of(model="untied")).begin_save(tmp_path / "untied").result()
    build(spec_of(model="moe")).begin_save(tmp_path / "moe").result()
    (tmp_path / "damaged").mkdir()
    both = ranks.make(spec_of())
    before = both.train_batch(toy_batch())
    for name in ("untied", "moe", "damaged"):
        with pytest.raises(CheckpointError):
            both.load(tmp_path / name)
    again = ranks.make(spec_of())
    assert again.train_batch(toy_batch()).loss == before.loss
    assert again.train_batch(toy_batch(step=1)).loss == both.train_batch(toy_batch(step=1)).loss
