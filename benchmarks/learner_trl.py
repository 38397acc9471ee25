"""The step of TRL's ``GRPOTrainer`` on a given batch: its loss, backward and optimizer."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learner.algorithms.metrics import TokenStats
from learner.backends.base import StepResult
from learner.backends.collate import plan_microbatches
from learner.backends.step_timer import StepTimer
from learner.batch import BatchItem, TrainBatch
from ringasync.config.schema import LearnerConfig


def _no_reward(**_: Any) -> list[float]:
    raise NotImplementedError("rewards are given")


class TrlStep:
    """``training_step`` of a trainer whose generation is left out, on rows as long as ours.

    As TRL's users have it: float32 weights under bf16 autocast where ``dtype`` is that, its own
    chunked LM head, loss ``dapo`` (a sum over the tokens of all micro-batches by their number,
    which is ours with the budget as the normalizer). Kinder than its own training, which shuffles
    the rows and pads each micro-batch to the longest of all.
    """

    def __init__(self, model: Any, learner: LearnerConfig, dtype: torch.dtype) -> None:
        """Makes the trainer with a tokenizer and a data set that are never used."""
        from datasets import Dataset
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast
        from trl import GRPOConfig, GRPOTrainer

        self._learner, self._device = learner, next(model.parameters()).device
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel({"<end>": 0}, unk_token="<end>")),
            eos_token="<end>",
            pad_token="<end>",
        )

        class Given(GRPOTrainer):  # type: ignore[misc]
            """Trains on what it is given instead of generating."""

            def _prepare_inputs(self, generation_batch: dict[str, Tensor]) -> dict[str, Tensor]:
                return generation_batch

        if learner.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with tempfile.TemporaryDirectory() as folder:
            settings = GRPOConfig(
                folder,
                learning_rate=learner.lr,
                max_grad_norm=learner.grad_clip,
                bf16=dtype == torch.bfloat16,
                gradient_checkpointing=learner.activation_checkpointing,
                gradient_checkpointing_kwargs={"use_reentrant": False},
                per_device_train_batch_size=2,
                num_generations=2,
                loss_type="dapo",
                report_to=[],
                use_cpu=self._device.type == "cpu",
            )
            self._trainer = Given(
                model=model,
                reward_funcs=_no_reward,
                args=settings,
                train_dataset=Dataset.from_list([{"prompt": "<end>"}] * 2),
                processing_class=tokenizer,
            )
        trainer = self._trainer
        trainer.create_optimizer()
        self._model, trainer.optimizer = trainer.accelerator.prepare(model, trainer.optimizer)

    def train_batch(self, batch: TrainBatch) -> StepResult:
        """One update; see ``LearnerBackend.train_batch``. Forward and backward are not told
        apart: ``training_step`` is both."""
        timer, trainer = StepTimer(self._device), self._trainer
        items = list(batch.items)
        lengths = [len(one.trajectory.prompt_ids) + one.scored_tokens for one in items]
        plan = plan_microbatches(lengths, self._learner.microbatch_tokens)
        trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = len(plan)
        self._model.train()
        losses: list[Tensor] = []
        for number, rows in enumerate(plan):
            trainer.accelerator.gradient_state._set_sync_gradients(number == len(plan) - 1)
            inputs = self._inputs([items[row] for row in rows], batch.trained_tokens)
            with timer.part("backward"):
                losses.append(trainer.training_step(self._model, inputs, None))
        with timer.part("optimizer"):
            parameters = self._model.parameters()
            norm = trainer.accelerator.clip_grad_norm_(parameters, self._learner.grad_clip)
            trainer.optimizer.step()
            self._model.zero_grad()
        empty = np.zeros(0)
        stats = TokenStats(empty, empty, empty.astype(np.int64), empty.astype(np.bool_), empty)
        total = float(torch.stack(losses).sum())
        return StepResult(total, float(norm), self._learner.lr, 1, stats, {}, timer.seconds())

    def _inputs(self, items: list[BatchItem], trained_tokens: int) -> dict[str, Tensor]:
        def tensor(value: Any) -> Tensor:
            return torch.as_tensor(value).to(self._device)

        prompts = np.stack([one.trajectory.prompt_ids for one in items]).astype(np.int64)
        width = max(one.scored_tokens for one in items)
        tokens = np.zeros((len(items), width), np.int64)
        mask = np.zeros((len(items), width), np.int64)
        for row, one in enumerate(items):
            tokens[row, : one.scored_tokens] = one.trajectory.token_ids[: one.scored_tokens]
            mask[row, : one.scored_tokens] = one.trained_mask[: one.scored_tokens]
        return {
            "prompt_ids": tensor(prompts),
            "prompt_mask": tensor(np.ones_like(prompts)),
            "completion_ids": tensor(tokens),
            "completion_mask": tensor(mask),
            "advantages": tensor(np.array([one.advantage for one in items], np.float32)),
            "num_items_in_batch": tensor(float(trained_tokens)),
        }
