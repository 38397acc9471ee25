"""Prompts on their way into the run: drawn from the mixture, rendered, tokenised, checked."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol

from ringasync.broker.types import NewGroup
from ringasync.config.schema import Config
from ringasync.coordinator.history import eval_group_id
from ringasync.errors import BadPromptError, ConfigError
from ringasync.runtime.heavy_imports import heavy_imports

Encode = Callable[[str], list[int]]
"""Rendered prompt to token ids, as the model's tokenizer has them."""

_MAX_HELD_OUT_IN_A_ROW = 10_000


class PromptProblem(Protocol):
    """What the mixture yields."""

    @property
    def prompt(self) -> str: ...
    @property
    def domain(self) -> str: ...
    @property
    def task(self) -> dict[str, Any]: ...


class PromptMixture(Protocol):
    """Prompts by index; raises ``BadPromptError`` for a bad row and ``IndexError`` past the end."""

    def problem(self, index: int) -> PromptProblem: ...


class PromptSource:
    """Makes ``NewGroup`` of the mixture's prompts. Blocking: call it in a thread.

    A prompt that cannot be used becomes a group that is quarantined from the start, with the
    reason; one that is in the held-out set is never trained on (``None``).
    """

    def __init__(
        self, config: Config, train: PromptMixture, held_out: PromptMixture, encode: Encode
    ) -> None:
        self._config, self._train, self._held_out, self._encode = config, train, held_out, encode
        self._held_out_prompts: frozenset[str] | None = None

    def train_group(self, index: int, group_id: str) -> NewGroup | None:
        """The group of training prompt ``index``; None when it is held out.

        Raises:
            IndexError: the data have ended.
        """
        size = self._config.schedule.group_size
        group = self._group(self._train, index, group_id, "train", size)
        return None if group.prompt in self._held_out_set() else group

    def eval_groups(self, label: str) -> list[NewGroup]:
        """The whole held-out set, for the evaluation ``label``; bad rows are left out.

        A finite source may hold fewer prompts than ``eval.prompts`` asks for.
        """
        groups = []
        for index in range(self._config.eval.prompts):
            try:
                group = self._group(self._held_out, index, eval_group_id(label, index), "eval", 1)
            except IndexError:
                break
            if not group.quarantine_reason:
                groups.append(group)
        return groups

    def _held_out_set(self) -> frozenset[str]:
        if self._held_out_prompts is None:
            self._held_out_prompts = frozenset(group.prompt for group in self.eval_groups("set"))
        return self._held_out_prompts

    def _group(
        self, mixture: PromptMixture, index: int, group_id: str, kind: Any, size: int
    ) -> NewGroup:
        prompt, domain, task, ids, reason = "", "unknown", {}, [], ""
        try:
            problem = mixture.problem(index)
            prompt, domain, task = problem.prompt, problem.domain, problem.task
            ids = self._tokens(prompt)
        except BadPromptError as error:
            reason = str(error) or "bad prompt"
        return NewGroup(
            group_id=group_id,
            kind=kind,
            domain=domain,
            # What is quarantined may not even be text that Redis can store.
            prompt="" if reason else prompt,
            prompt_ids=tuple(ids),
            task=task if not reason else {},
            source_index=index,
            size=size,
            max_new_tokens=self._config.sampling.max_new_tokens,
            quarantine_reason=reason,
        )

    def _tokens(self, prompt: str) -> list[int]:
        if not prompt.strip():
            raise BadPromptError("the prompt is empty")
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadPromptError(f"the prompt is not UTF-8: {error.reason}") from error
        ids = self._encode(prompt)
        room = self._config.model.max_model_len_tokens - self._config.sampling.max_new_tokens
        if not ids:
            raise BadPromptError("the prompt has no tokens")
        if len(ids) > room:
            raise BadPromptError(
                f"the prompt has {len(ids)} tokens; model.max_model_len_tokens less "
                f"sampling.max_new_tokens leaves room for {room}"
            )
        return ids


class PromptCursor:
    """Walks the training prompts in order, leaving out closed and held-out ones."""

    def __init__(self, source: PromptSource, is_closed: Callable[[int], bool], suffix: str) -> None:
        self._source, self._is_closed, self._suffix = source, is_closed, suffix

    def collect(self, start: int, count: int) -> tuple[list[NewGroup], int, bool]:
        """Up to ``count`` groups from index ``start``; the next index; whether the data ended.

        Raises:
            ConfigError: everything is held out: there is nothing to train on.
        """
        groups: list[NewGroup] = []
        index, held_out = start, 0
        while len(groups) < count:
            if self._is_closed(index):
                index += 1
                continue
            try:
                group = self._source.train_group(index, group_id(index, self._suffix))
            except IndexError:
                return groups, index, True
            index += 1
            if group is not None:
                groups.append(group)
                held_out = 0
                continue
            held_out += 1
            if held_out >= _MAX_HELD_OUT_IN_A_ROW:
                raise ConfigError(
                    f"{held_out} prompts in a row are all in the held-out set: give the tasks more "
                    "prompts, or lower eval.prompts"
                )
        return groups, index, False


def group_id(index: int, suffix: str = "") -> str:
    """Group id of training prompt ``index``; ``suffix`` tells lives of an emptied Redis apart."""
    return f"g{index:06d}{suffix}"


def load_encoder(model: str, template: str) -> Encode:
    """The model's tokenizer with the configured template. Blocking; imports transformers.

    Raises:
        ConfigError: there is no tokenizer at ``model``, or it has no chat template.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with heavy_imports():
        from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model {model!r} has no tokenizer that can be loaded: {error}"
        ) from error
    if template == "tokenizer":
        if not tokenizer.chat_template:
            raise ConfigError(
                f"data.template is 'tokenizer', but the tokenizer of {model!r} has no chat "
                "template: set data.template to a text with {prompt}"
            )
        return lambda prompt: list(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
        )
    if "{prompt}" not in template:
        raise ConfigError(f"data.template {template!r} must contain {{prompt}}")
    return lambda prompt: list(tokenizer(template.replace("{prompt}", prompt))["input_ids"])
