"""What every train engine must do. Subclass ``BackendContract`` and give it ``make``."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from learner.backends.base import Backend, ScoredSequence
from learner.batch import BatchItem, TrainBatch
from ringasync.config.schema import LearnerConfig, LossConfig
from ringasync.errors import CheckpointError, NonFiniteLogprobError

from .checkpoint_kit import restore, snapshot
from .kit import batch_of, toy_batch, trajectory


def learner_config(**changes: object) -> LearnerConfig:
    """A learner of one update at a constant rate."""
    return LearnerConfig.model_validate({"lr": 1e-3, "warmup_steps": 0, **changes})


def scored(batch: TrainBatch) -> list[ScoredSequence]:
    """The batch's responses as sequences to score."""
    return [
        ScoredSequence(
            tuple(item.trajectory.prompt_ids.tolist()), tuple(item.trajectory.token_ids.tolist())
        )
        for item in batch.items
    ]


def weights_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether the model's tensors are the same bit for bit."""
    names = [name for name in a if name.startswith("model.")]
    assert names
    return all(torch.equal(a[name], b[name]) for name in names)


class BackendContract:
    """Tests of the ``Backend`` protocol; every engine starts from the same tiny model."""

    @abstractmethod
    def make(
        self,
        learner: LearnerConfig | None = None,
        loss: LossConfig | None = None,
        *,
        temperature: float = 1.0,
    ) -> Backend:
        """A fresh engine on the tiny model of ``kit``."""

    def test_loss_is_sum_over_budget(self) -> None:
        backend = self.make(loss=LossConfig(mismatch="none"))
        batch = toy_batch()
        expected = -sum(item.advantage * item.trained_tokens for item in batch.items)
        result = backend.train_batch(batch)
        # one update: r = 1 everywhere, so the loss is -sum of advantages / Phi
        assert result.loss == pytest.approx(expected / batch.budget_tokens, rel=1e-5)
        assert result.tokens.num_tokens == batch.trained_tokens

    @pytest.mark.parametrize("normalizer", ["budget", "sequence"])
    def test_any_split_gives_the_same_step(self, normalizer: str) -> None:
        loss = LossConfig.model_validate({"normalizer": normalizer})
        results, states = [], []
        for limit in (1, 40, 100_000):
            backend = self.make(learner_config(microbatch_tokens=limit), loss)
            results.append(backend.train_batch(toy_batch()))
            states.append(snapshot(backend))
        for other in results[1:]:
            assert other.loss == pytest.approx(results[0].loss, rel=1e-4, abs=1e-7)
            assert other.grad_norm == pytest.approx(results[0].grad_norm, rel=1e-4)
        for name, tensor in states[0].items():
            if name.endswith("exp_avg"):
                torch.testing.assert_close(tensor, states[2][name], rtol=1e-3, atol=1e-7)

    def test_learns_what_has_a_positive_advantage(self) -> None:
        backend = self.make(learner_config(lr=3e-3), LossConfig(mismatch="none"))
        batch = toy_batch()
        before = backend.logprobs(scored(batch), temperature=1.0)
        for step in range(5):
            backend.train_batch(replace(batch, learner_step=step))
        after = backend.logprobs(scored(batch), temperature=1.0)
        change = sum(
            math.copysign(1.0, item.advantage) * float((new - old).sum())
            for item, old, new in zip(batch.items, before, after, strict=True)
        )
        assert change > 1.0

    def test_behavior_logprobs_of_the_same_weights_give_ratio_one(self) -> None:
        temperature = 0.7
        backend = self.make(temperature=temperature)
        batch = toy_batch()
        known = backend.logprobs(scored(batch), temperature=temperature)
        items = tuple(
            replace(item, trajectory=replace(item.trajectory, behavior_logprobs=values))
            for item, values in zip(batch.items, known, strict=True)
        )
        result = backend.train_batch(replace(batch, items=items))
        assert float(np.abs(result.tokens.log_ratio).max()) < 1e-4

    def test_the_cut_tail_changes_nothing(self) -> None:
        cut = trajectory("g.0", 20)
        changed = replace(
            cut,
            token_ids=np.concatenate([cut.token_ids[:12], cut.token_ids[12:][::-1]]),
            behavior_logprobs=np.concatenate(
                [cut.behavior_logprobs[:12], np.full(8, np.nan, np.float32)]
            ),
        )
        states = []
        for one in (cut, changed):
            backend = self.make()
            result = backend.train_batch(batch_of([BatchItem(one, 1.0, 12)]))
            assert result.tokens.num_tokens == 12
            states.append(snapshot(backend))
        assert weights_equal(*states)

    def test_environment_tokens_are_context_only(self) -> None:
        one = trajectory("g.0", 12)
        mask = np.ones(12, np.bool_)
        mask[4:7] = False
        mixed = replace(one, loss_mask=mask)
        assert mixed.num_policy_tokens == 9
        assert BatchItem(mixed, 1.0, 5).scored_tokens == 8
        result = self.make().train_batch(batch_of([BatchItem(mixed, 1.0, 9)]))
        assert result.tokens.num_tokens == 9

    def test_a_rollout_of_three_versions_trains_as_one(self) -> None:
        one = trajectory("g.0", 12, versions=(3, 4, 5))
        batch = replace(batch_of([BatchItem(one, 1.0, 12)], step=4), ages={3: 2, 4: 1, 5: 0})
        result = self.make().train_batch(batch)
        assert result.tokens.ages.tolist() == [2] * 4 + [1] * 4 + [0] * 4
        single = trajectory("g.0", 12)
        same = self.make().train_batch(batch_of([BatchItem(single, 1.0, 12)]))
        assert result.loss == same.loss  # versions are for staleness and metrics only

    def test_lr_zero_changes_no_weight(self) -> None:
        backend = self.make(learner_config(lr=0.0, weight_decay=0.1))
        before = snapshot(backend)
        result = backend.train_batch(toy_batch())
        assert result.lr == 0.0
        assert result.grad_norm > 0
        assert weights_equal(before, snapshot(backend))

    def test_warm_up(self) -> None:
        backend = self.make(learner_config(lr=1.0, warmup_steps=4, grad_clip=1e-9))
        rates = [backend.train_batch(toy_batch(2, step=step)).lr for step in range(6)]
        assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])

    def test_more_updates_use_the_proximal_pass(self) -> None:
        backend = self.make(learner_config(updates_per_batch=3, lr=0.02))
        result = backend.train_batch(toy_batch())
        assert result.updates == 3
        assert result.tokens.clipped.any()  # theta has moved away from theta_old
        one = self.make().train_batch(toy_batch())
        np.testing.assert_allclose(result.tokens.log_ratio, one.tokens.log_ratio, atol=1e-5)
        assert not one.tokens.clipped.any()

    def test_state_round_trip_is_exact(self) -> None:
        one = self.make(learner_config(warmup_steps=3))
        one.train_batch(toy_batch())
        middle = snapshot(one)
        other = self.make(learner_config(warmup_steps=3))
        restore(other, middle)
        for step in (1, 2):
            batch = toy_batch(step=step)
            assert one.train_batch(batch).loss == other.train_batch(batch).loss
        first, second = snapshot(one), snapshot(other)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_a_save_is_of_its_moment_and_the_next_batch_need_not_wait(self, tmp_path: Path) -> None:
        one, other = self.make(), self.make()
        one.train_batch(toy_batch())
        before = snapshot(one)
        saving = one.begin_save(tmp_path / "first")
        after = one.train_batch(toy_batch(step=1))
        second = one.begin_save(tmp_path / "second")  # waits for the first: its memory is used
        assert saving.done()
        second.result()
        other.load(tmp_path / "first")
        found = snapshot(other)
        assert found.keys() == before.keys()
        assert all(torch.equal(found[name], before[name]) for name in before)
        assert other.train_batch(toy_batch(step=1)).loss == after.loss
        other.load(tmp_path / "second")
        assert weights_equal(snapshot(other), snapshot(one))

    def test_a_damaged_folder_changes_nothing(self, tmp_path: Path) -> None:
        backend = self.make()
        backend.train_batch(toy_batch())
        backend.begin_save(tmp_path).result()
        backend.train_batch(toy_batch(step=1))
        before = snapshot(backend)
        data = max(tmp_path.glob("*.distcp"), key=lambda path: path.stat().st_size)
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
        with pytest.raises(CheckpointError, match=tmp_path.name):
            backend.load(tmp_path)
        with pytest.raises(CheckpointError):
            backend.load(tmp_path / "absent")
        after = snapshot(backend)
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_a_save_that_cannot_be_written_says_so(self, tmp_path: Path) -> None:
        backend = self.make()
        (tmp_path / "file").touch()
        with pytest.raises(CheckpointError, match="cannot be written"):
            backend.begin_save(tmp_path / "file" / "tensors").result()
        backend.begin_save(tmp_path / "good").result()
        backend.load(tmp_path / "good")

    def test_leaving_the_device_changes_no_bit(self) -> None:
        one, other = (self.make(learner_config(warmup_steps=3)) for _ in range(2))
        other.offload()
        for step in range(3):
            batch = toy_batch(step=step)
            other.onload()
            other.onload()
            assert one.train_batch(batch).loss == other.train_batch(batch).loss
            other.offload()
            other.offload()
        first, second = snapshot(one), snapshot(other)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name].cpu(), second[name].cpu()) for name in first)
        third = self.make(learner_config(warmup_steps=3))
        third.offload()
        restore(third, second)
        third.onload()
        batch = toy_batch(step=3)
        assert one.train_batch(batch).loss == third.train_batch(batch).loss

    def test_state_of_another_model_is_refused(self) -> None:
        backend = self.make()
        before = snapshot(backend)
        missing = dict(before)
        name = next(one for one in before if one.startswith("model."))
        del missing[name]
        with pytest.raises(CheckpointError, match="another model"):
            restore(backend, missing)
        with pytest.raises(CheckpointError, match="shape"):
            restore(backend, {**before, name: torch.zeros(3)})
        assert weights_equal(before, snapshot(backend))

    def test_non_finite_logprob_names_the_rollout_and_steps_nothing(self) -> None:
        backend = self.make(learner_config(microbatch_tokens=1))
        state = snapshot(backend)
        embedding = next(name for name in state if "embed_tokens" in name)
        poisoned = state[embedding].clone()
        poisoned[7] = math.nan
        restore(backend, {**state, embedding: poisoned})
        before = snapshot(backend)
        good = trajectory("good.0", 4)
        good = replace(good, token_ids=np.full(4, 3, np.int32), prompt_ids=np.array([1], np.int32))
        bad = replace(good, rollout_id="bad.1", prompt_ids=np.array([7], np.int32))
        with pytest.raises(NonFiniteLogprobError, match="non-finite"):
            backend.train_batch(batch_of([BatchItem(good, 1.0, 4), BatchItem(bad, 1.0, 4)]))
        after = snapshot(backend)
        assert torch.equal(before["train.updates"], after["train.updates"])
        others = [name for name in before if name != embedding]
        assert all(torch.equal(before[name], after[name]) for name in others)

    def test_saved_folder_gives_the_same_logprobs(self, tmp_path: Path) -> None:
        from transformers import AutoModelForCausalLM

        backend = self.make()
        backend.train_batch(toy_batch())
        backend.save_hf(tmp_path)
        assert (tmp_path / "config.json").is_file()
        assert (tmp_path / "model.safetensors").is_file()
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        for one, values in zip(
            scored(toy_batch()), backend.logprobs(scored(toy_batch()), temperature=1.0), strict=True
        ):
            ids = torch.tensor([one.prompt_ids + one.token_ids])
            with torch.no_grad():
                logprobs = loaded(ids).logits[0].log_softmax(-1)
            places = torch.arange(len(one.token_ids)) + len(one.prompt_ids) - 1
            expected = logprobs[places, torch.tensor(one.token_ids)].numpy()
            np.testing.assert_allclose(values, expected, atol=2e-5)

    def test_an_export_beside_the_next_batch_has_the_weights_before_it(
        self, tmp_path: Path
    ) -> None:
        backend = self.make()
        for step in range(2):  # the second time the copy's memory is there already
            backend.train_batch(toy_batch(step=step))
            backend.save_hf(tmp_path / f"waited-{step}")
            export = backend.begin_export(tmp_path / f"beside-{step}")
            backend.train_batch(toy_batch(step=step + 5))
            export.result()
        folders = [tmp_path / f"{way}-{step}" for step in (0, 1) for way in ("waited", "beside")]
        names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
        assert "model.safetensors" in names[0]
        assert names == [names[0]] * 4
        first, beside, second, beside_second = (
            [(folder / name).read_bytes() for name in names[0]] for folder in folders
        )
        assert first == beside
        assert second == beside_second
        assert first != second

    def test_sampling_repeats_and_changes_nothing(self) -> None:
        backend = self.make()
        before = snapshot(backend)
        first = backend.sample(3, 6, seed=1)
        assert backend.sample(3, 6, seed=1) == first
        assert backend.sample(3, 6, seed=2) != first
        assert [len(one.token_ids) for one in first] == [6, 6, 6]
        after = snapshot(backend)
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_nothing_to_train_is_a_step_without_effect(self) -> None:
        backend = self.make()
        before = snapshot(backend)
        result = backend.train_batch(TrainBatch("b", 0, 10, ()))
        assert (result.loss, result.tokens.num_tokens) == (0.0, 0)
        assert weights_equal(before, snapshot(backend))
        empty = ScoredSequence((1,), ())
        assert [one.shape for one in backend.logprobs([empty], temperature=1.0)] == [(0,)]
