"""Supervised fine-tuning of the starter model: packed worked solutions, Muon and AdamW."""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from learner.starter import Report
from ringasync.config.schema import Config, StarterConfig
from ringasync.errors import BadPromptError, ConfigError
from ringasync.tasks.base import generator
from ringasync.tasks.mixture import Mixture, build_mixture

PAD, USER, ASSISTANT, END, UNKNOWN = "<pad>", "<user>", "<assistant>", "<end>", "<unk>"
SPECIAL = (PAD, USER, ASSISTANT, END, UNKNOWN)
ALPHABET = tuple(sorted(string.ascii_letters + string.digits + string.punctuation + " \n"))

_IGNORED = -100
_MAX_MISSES = 12
"""Solutions that fit no row before a step's rows count as full."""
_MIN_LR_FACTOR = 0.02


def build_tokenizer() -> Any:
    """One token a character, plus the marks of a chat; a ``PreTrainedTokenizerFast``."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *ALPHABET))}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    raw.decoder = decoders.Fuse()
    raw.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=(
            "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}"
            "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
        ),
    )


def build_model(settings: StarterConfig, vocab_size: int, window_tokens: int) -> Any:
    """A fresh fp32 Qwen3. Embeddings are tied: a third fewer parameters at this size."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.num_layers,
            num_attention_heads=settings.num_heads,
            num_key_value_heads=settings.num_kv_heads,
            head_dim=settings.head_dim,
            max_position_embeddings=window_tokens,
            tie_word_embeddings=True,
            pad_token_id=SPECIAL.index(PAD),
            eos_token_id=SPECIAL.index(END),
            bos_token_id=None,
        )
    )


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

    def __init__(self, config: Config, tokenizer: Any) -> None:
        self._template = config.data.template
        self._tokenizer = tokenizer
        self._seed = config.run.seed
        self._row_tokens = config.starter.row_tokens
        self.short_share = config.starter.short_share_early
        self._mixture = build_mixture(config.data, generator(self._seed, "starter").getrandbits(31))
        held_out = build_mixture(config.data, config.eval.seed)
        self._held_out = frozenset(_prompts(held_out, config.eval.prompts))

    def __iter__(self) -> Iterator[Example]:
        index = skipped = 0
        while True:
            example = self._example(index)
            index += 1
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


def train_starter(config: Config, folder: Path, report: Report) -> None:
    """Fine-tune a fresh model and save it with its tokenizer into ``folder`` (HF format)."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # ours is on the terminal
    settings = config.starter
    torch.set_num_threads(settings.threads)
    torch.manual_seed(config.run.seed)
    tokenizer = build_tokenizer()
    model = build_model(settings, len(tokenizer), config.model.max_model_len_tokens)
    examples = Examples(config, tokenizer)
    packer = Packer(iter(examples), settings.rows, settings.row_tokens)
    optimizers = _optimizers(model, settings)
    base = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    model.train()
    for step in range(settings.steps):
        if step >= settings.early_part * settings.steps:
            examples.short_share = settings.short_share
        factor = _lr_factor(step, settings)
        for optimizer, rates in zip(optimizers, base, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        loss = _loss(model, *packer.next())
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        report(step + 1, loss.item())
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _loss(
    model: Any, ids: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Mean cross-entropy of the response tokens; logits are made for these only."""
    hidden = model.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    wanted = labels != _IGNORED
    return functional.cross_entropy(model.lm_head(hidden[wanted]), labels[wanted])


def _optimizers(model: Any, settings: StarterConfig) -> list[torch.optim.Optimizer]:
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        (matrices if is_matrix else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=settings.muon_lr, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(others, lr=settings.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _lr_factor(step: int, settings: StarterConfig) -> float:
    """Linear warm-up, a plateau, linear decay over the last 60 % of the steps."""
    warm = (step + 1) / settings.warmup_steps
    decay = max(_MIN_LR_FACTOR, 1.6 * (1 - step / settings.steps))
    return min(1.0, warm, decay)
