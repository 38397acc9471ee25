"""The torch backend under the contract, and what is its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.backends.base import Backend
from learner.backends.collate import collate, plan_microbatches
from learner.backends.token_scores import TokenScores
from learner.backends.torch_backend import TorchBackend, TorchSettings
from learner.batch import BatchItem
from ringasync.config.schema import LearnerConfig, LossConfig
from ringasync.errors import NonFiniteLogprobError, TrainingError

from .backend_contract import BackendContract, learner_config
from .kit import batch_of, tiny_backend, tiny_model, toy_batch, trajectory


class TestTorchBackend(BackendContract):
    def make(
        self,
        learner: LearnerConfig | None = None,
        loss: LossConfig | None = None,
        *,
        temperature: float = 1.0,
    ) -> Backend:
        return tiny_backend(learner, loss, temperature=temperature)


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 200))
def test_plan_covers_every_row_and_keeps_the_limit(sizes: list[int], limit: int) -> None:
    plan = plan_microbatches(sizes, limit)
    assert sorted(index for chosen in plan for index in chosen) == list(range(len(sizes)))
    for chosen in plan:
        padded = len(chosen) * max(sizes[index] for index in chosen)
        assert padded <= limit or len(chosen) == 1


def test_collate_points_at_the_logits_that_predict() -> None:
    one = trajectory("g.0", 3)
    (micro,) = collate(
        batch_of([BatchItem(one, 2.0, 2)], budget=8), microbatch_tokens=99, normalizer="budget"
    )
    # 5 prompt ids, then 2 of 3 response ids: the third is cut and never shown to the model
    assert micro.input_ids.tolist() == [[*one.prompt_ids.tolist(), *one.token_ids[:2].tolist()]]
    assert micro.columns.tolist() == [4, 5]
    assert micro.targets.tolist() == one.token_ids[:2].tolist()
    assert micro.inverse_denominators.tolist() == [0.125, 0.125]


def test_untied_weights_and_missing_logits_to_keep_work() -> None:
    settings = TorchSettings(learner_config(logprob_chunk_tokens=0), LossConfig())
    backend = TorchBackend(tiny_model(tied=False), settings)
    assert isinstance(backend._scores, TokenScores)
    backend._scores._keeps_logits = False
    full = backend.train_batch(toy_batch())
    other = TorchBackend(tiny_model(tied=False), settings).train_batch(toy_batch())
    assert full.loss == pytest.approx(other.loss, rel=1e-5)
    np.testing.assert_allclose(full.tokens.log_ratio, other.tokens.log_ratio, atol=1e-5)
    assert np.isfinite(full.tokens.entropy).all()


def test_bfloat16_forward_keeps_a_float32_master() -> None:
    settings = TorchSettings(learner_config(lr=1e-5), LossConfig(), dtype=torch.bfloat16)
    backend = TorchBackend(tiny_model(), settings)
    before = {name: value.clone() for name, value in backend.state_dict().items()}
    backend.train_batch(toy_batch())
    after = backend.state_dict()
    model = [name for name in before if name.startswith("model.")]
    assert all(after[name].dtype == torch.float32 for name in model)
    assert any(not torch.equal(before[name], after[name]) for name in model)


def test_infinite_gradient_is_no_step() -> None:
    backend = tiny_backend(loss=LossConfig(mismatch="none"))
    before = {name: value.clone() for name, value in backend.state_dict().items()}
    one = trajectory("g.0", 4)
    with pytest.raises(TrainingError, match="gradient norm"):
        backend.train_batch(batch_of([BatchItem(one, float("inf"), 4)]))
    assert all(torch.equal(value, before[name]) for name, value in backend.state_dict().items())


def test_error_names_the_rollout() -> None:
    backend = tiny_backend(learner_config(microbatch_tokens=10_000))
    with torch.no_grad():
        backend.model.get_input_embeddings().weight[7] = float("nan")  # type: ignore[operator]
    good = trajectory("good.0", 4)
    good.token_ids[:] = 3
    good.prompt_ids[:] = 1
    bad = trajectory("bad.1", 4)
    bad.token_ids[:] = 3
    bad.prompt_ids[:] = 7
    # Tied weights: the poisoned row would also be a logit everywhere.
    untied = TorchBackend(tiny_model(tied=False), TorchSettings(learner_config(), LossConfig()))
    with torch.no_grad():
        untied.model.get_input_embeddings().weight[7] = float("nan")  # type: ignore[operator]
    items = [BatchItem(good, 1.0, 4), BatchItem(bad, 1.0, 4)]
    with pytest.raises(NonFiniteLogprobError, match=r"4 trained tokens.*rollout bad\.1"):
        untied.train_batch(batch_of(items))


def test_unknown_model_is_explained() -> None:
    with pytest.raises(TrainingError, match=r"cannot load model.*model\.path"):
        TorchBackend.from_pretrained(
            "/no/such/folder", TorchSettings(learner_config(), LossConfig())
        )
