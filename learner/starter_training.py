"""Supervised fine-tuning of the starter model: packed worked solutions, Muon and AdamW."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from learner.backends.experts import use_autocast_experts
from learner.devices import resolve_device
from learner.starter import Report
from learner.starter_model import build_model, build_optimizers, learning_rates
from learner.starter_tokenizer import ASSISTANT, END, PAD, SPECIAL, USER, build_tokenizer
from ringasync.config.schema import Config, StarterConfig
from ringasync.errors import BadPromptError, ConfigError
from ringasync.tasks.base import generator
from ringasync.tasks.mixture import Mixture, build_mixture

_IGNORED = -100
_MAX_MISSES = 12
"""Solutions that fit no row before a step's rows count as full."""
_MIN_LR_FACTOR = 0.02


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of a prompt and of one correct response, end mark included."""

    prompt_ids: list[int]
    response_ids: list[int]

    @property
    def num_tokens(self) -> int:
        """Prompt and response."""
        return len(self.prompt_ids) + len(self.response_ids)


class Packer:
    """Fills ``rows`` x ``row_tokens`` with whole examples, no padding between them.

    Restarting position ids tell the attention where an example begins.
    """

    def __init__(self, examples: Iterator[Example], rows: int, row_tokens: int) -> None:
        self._examples, self._rows, self._row_tokens = examples, rows, row_tokens
        self._waiting: list[Example] = []

    def next(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``input_ids``, ``position_ids`` and ``labels`` (-100 off the responses), all [R, T]."""
        rows: list[list[Example]] = [[] for _ in range(self._rows)]
        left = [self._row_tokens] * self._rows
        missed: list[Example] = []
        while len(missed) < _MAX_MISSES:
            example = self._waiting.pop(0) if self._waiting else next(self._examples)
            fitting = [row for row, room in enumerate(left) if room >= example.num_tokens]
            if not fitting:
                missed.append(example)
                continue
            row = min(fitting, key=left.__getitem__)
            rows[row].append(example)
            left[row] -= example.num_tokens
        self._waiting = missed + self._waiting
        return self._tensors(rows)

    def _tensors(
        self, rows: list[list[Example]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shape = (self._rows, self._row_tokens)
        ids = torch.full(shape, SPECIAL.index(PAD))
        positions = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, _IGNORED)
        for row, examples in enumerate(rows):
            start = 0
            for example in examples:
                end, split = start + example.num_tokens, start + len(example.prompt_ids)
                ids[row, start:end] = torch.tensor(example.prompt_ids + example.response_ids)
                positions[row, start:end] = torch.arange(example.num_tokens)
                labels[row, split - 1 : end - 1] = torch.tensor(example.response_ids)
                start = end
        return ids, positions, labels


class Examples:
    """Endless solutions in two styles, none of them of a held-out prompt."""

    def __init__(self, config: Config, tokenizer: Any, first: int = 0, stride: int = 1) -> None:
        """Only problems ``first``, ``first + stride``, ...: one share of several processes."""
        self._first, self._stride = first, stride
        self._template = config.data.template
        self._tokenizer = tokenizer
        self._seed = config.run.seed
        self._row_tokens = config.starter.row_tokens
        self.short_share = config.starter.short_share_early
        self._mixture = build_mixture(config.data, generator(self._seed, "starter").getrandbits(31))
        held_out = build_mixture(config.data, config.eval.seed)
        self._held_out = frozenset(_prompts(held_out, config.eval.prompts))

    def __iter__(self) -> Iterator[Example]:
        index, skipped = self._first, 0
        while True:
            example = self._example(index)
            index += self._stride
            if example is not None:
                skipped = 0
                yield example
                continue
            skipped += 1
            if skipped > 10_000:
                raise ConfigError(
                    "model.path is 'starter', but the tasks give no solutions to learn from that "
                    f"fit into starter.row_tokens ({self._row_tokens}): use reasoning_gym or "
                    "mathematics tasks, or name another model"
                )

    def _example(self, index: int) -> Example | None:
        """None when the prompt is held out, broken, without a solution or too long."""
        short = generator(self._seed, "style", index).random() < self.short_share
        try:
            prompt = self._mixture.problem(index).prompt
            solution = self._mixture.solution(index, "short" if short else "worked")
        except BadPromptError:
            return None
        except IndexError as error:
            raise ConfigError(
                f"model.path is 'starter', but the tasks end after {index} prompts: set "
                "data.epochs to none, add procedural tasks, or name another model"
            ) from error
        if solution is None or prompt in self._held_out:
            return None
        if self._template == "tokenizer":
            text = f"{USER}{prompt}{ASSISTANT}"
        else:
            text = self._template.replace("{prompt}", prompt)
        example = Example(self._ids(text), self._ids(solution + END))
        return example if example.num_tokens <= self._row_tokens else None

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])


def _prompts(mixture: Mixture, count: int) -> Iterator[str]:
    for index in range(count):
        try:
            yield mixture.problem(index).prompt
        except BadPromptError:
            continue
        except IndexError:
            return


class Batches(IterableDataset[tuple[Tensor, Tensor, Tensor]]):
    """What ``Packer`` gives for each step in turn: ids, positions and labels, int64 [R, T] each.

    Of W data processes, number w makes the steps w, w + W, ... from every W-th problem, so what a
    step learns from does not depend on which process is faster.
    """

    def __init__(self, config: Config, tokenizer: Any) -> None:
        super().__init__()
        self._config, self._tokenizer = config, tokenizer

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        share = get_worker_info()
        first, stride = (0, 1) if share is None else (share.id, share.num_workers)
        settings = self._config.starter
        examples = Examples(self._config, self._tokenizer, first, stride)
        packer = Packer(iter(examples), settings.rows, settings.row_tokens)
        for step in range(first, settings.steps, stride):
            if step >= settings.early_part * settings.steps:
                examples.short_share = settings.short_share
            yield packer.next()


def _loader(config: Config, tokenizer: Any) -> DataLoader[tuple[Tensor, Tensor, Tensor]]:
    """``Batches``, made ahead by ``starter.data_workers`` processes or else when asked for."""
    workers = config.starter.data_workers
    return DataLoader(
        Batches(config, tokenizer),
        batch_size=None,
        num_workers=workers,
        # A process forked while torch has threads may hang; spawned ones begin clean.
        multiprocessing_context="spawn" if workers else None,
        prefetch_factor=4 if workers else None,
        generator=torch.Generator(),  # its base seed must not come out of the model's stream
    )


def train_starter(config: Config, folder: Path, report: Report) -> None:
    """Fine-tune a fresh model and save it with its tokenizer into ``folder`` (HF format).

    On CUDA the forward passes run under bf16 autocast; weights and optimizers stay float32.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # ours is on the terminal
    settings = config.starter
    device = resolve_device(settings.device, "starter.device")
    torch.set_num_threads(settings.threads)
    torch.manual_seed(config.run.seed)
    tokenizer = build_tokenizer()
    model = build_model(settings, len(tokenizer), config.model.max_model_len_tokens).to(device)
    use_autocast_experts(model)
    optimizers = build_optimizers(model, settings)
    base = learning_rates(optimizers)
    model.train()
    for step, batch in enumerate(_loader(config, tokenizer)):
        factor = _lr_factor(step, settings)
        for optimizer, rates in zip(optimizers, base, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        ids, positions, labels = (each.to(device, non_blocking=True) for each in batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, balance = _loss(model, ids, positions, labels)
        model.zero_grad()
        (loss if balance is None else loss + balance).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        report(step + 1, loss.item())
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _loss(
    model: Any, ids: Tensor, positions: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Mean cross-entropy of the response tokens, for which alone logits are made; and for MoE the
    load-balancing loss, weighted, over all tokens but padding."""
    routed = getattr(model.config, "router_aux_loss_coef", 0.0)
    extra = {"output_router_logits": True} if routed else {}
    output = model.model(input_ids=ids, position_ids=positions, use_cache=False, **extra)
    wanted = labels != _IGNORED
    hidden = output.last_hidden_state[wanted]
    loss = functional.cross_entropy(model.lm_head(hidden), labels[wanted])
    if not routed:
        return loss, None
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    balance = load_balancing_loss_func(
        tuple(each.float() for each in output.router_logits),
        model.num_experts,
        model.num_experts_per_tok,
        (ids != SPECIAL.index(PAD)).long(),
    )
    return loss, routed * balance


def _lr_factor(step: int, settings: StarterConfig) -> float:
    """Linear warm-up, a plateau, linear decay over the last 60 % of the steps."""
    warm = (step + 1) / settings.warmup_steps
    decay = max(_MIN_LR_FACTOR, 1.6 * (1 - step / settings.steps))
    return min(1.0, warm, decay)
