"""The starter model: tokenizer, packing, fine-tuning, cache; tiny models, real tasks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from learner import starter, starter_training
from learner.starter import cache_dir, ensure_starter, main, starter_key
from learner.starter_model import build_model
from learner.starter_tokenizer import SPECIAL, build_tokenizer
from learner.starter_training import Example, Examples, Packer
from ringasync.config.schema import Config, DataConfig, StarterConfig, TaskConfig
from ringasync.errors import ConfigError
from ringasync.tasks.mixture import build_mixture

SUMS = TaskConfig(
    name="sums",
    kind="reasoning_gym",
    dataset="chain_sum",
    params={"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 1},
    compact=True,
    answer_mark="=",
)
EQUATIONS = TaskConfig(name="equations", kind="mathematics")
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_layers": 1,
    "num_heads": 1,
    "num_kv_heads": 1,
    "intermediate_size": 32,
    "steps": 2,
    "rows": 4,
    "row_tokens": 48,
    "threads": 1,
}


def config_of(*tasks: TaskConfig, starter: dict[str, Any] | None = None, **more: Any) -> Config:
    data = DataConfig(tasks=tasks or (SUMS, EQUATIONS), template="<user>{prompt}<assistant>")
    return Config(data=data, starter=StarterConfig(**{**TINY, **(starter or {})}), **more)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RINGASYNC_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# -- tokenizer ---------------------------------------------------------------------------------


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40))
def test_text_survives_the_tokenizer_one_token_a_character(text: str) -> None:
    tokenizer = TOKENIZER
    ids = tokenizer(text)["input_ids"]
    if not any(mark in text for mark in SPECIAL):
        assert len(ids) == len(text)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


TOKENIZER = build_tokenizer()


def test_marks_are_single_tokens_and_left_out_of_responses() -> None:
    ids = TOKENIZER("<user>1+1<assistant>=2<end>")["input_ids"]
    assert len(ids) == 3 + 3 + 2
    assert ids[-1] == TOKENIZER.eos_token_id
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "1+1=2"


def test_character_outside_the_alphabet_is_one_unknown_token() -> None:
    assert TOKENIZER("é")["input_ids"] == [TOKENIZER.unk_token_id]


def test_chat_template_is_the_demos_template() -> None:
    chat = [{"role": "user", "content": "1+1"}]
    ids = TOKENIZER.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert ids == TOKENIZER("<user>1+1<assistant>")["input_ids"]


# -- packing -----------------------------------------------------------------------------------

lengths = st.lists(st.tuples(st.integers(1, 10), st.integers(1, 22)), min_size=1, max_size=40)


@given(lengths, st.integers(1, 5))
def test_packed_rows_hold_whole_examples_with_their_own_positions(
    sizes: list[tuple[int, int]], rows: int
) -> None:
    def endless() -> Iterator[Example]:
        number = 0
        while True:
            prompt, response = sizes[number % len(sizes)]
            first = 100 + 100 * number  # every token is seen once in all
            yield Example(
                list(range(first, first + prompt)),
                list(range(first + prompt, first + prompt + response)),
            )
            number += 1

    packer = Packer(endless(), rows, 32)
    seen: set[int] = set()
    for _ in range(3):
        ids, positions, labels = packer.next()
        assert ids.shape == positions.shape == labels.shape == (rows, 32)
        for row in range(rows):
            for place in range(32):
                token = int(ids[row, place])
                if token < 100:
                    continue
                number, offset = divmod(token - 100, 100)
                prompt, response = sizes[number % len(sizes)]
                assert token not in seen
                seen.add(token)
                assert int(positions[row, place]) == offset
                is_last = offset == prompt + response - 1
                trained = prompt - 1 <= offset and not is_last
                assert int(labels[row, place]) == (token + 1 if trained else -100)
        counts = [sizes[n % len(sizes)] for n in {(t - 100) // 100 for t in seen}]
        assert len(seen) == sum(prompt + response for prompt, response in counts)


def test_no_example_is_left_out() -> None:
    examples = (Example([9], [number] * 20) for number in range(10, 10_000))
    packer = Packer(examples, 2, 30)
    fed = [int(row[1]) for _ in range(20) for row in packer.next()[0]]
    assert sorted(fed) == list(range(10, 50))


def test_packed_examples_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    model = build_model(StarterConfig(**TINY), len(TOKENIZER), 64).eval()
    examples = [Example([5 + n, 6], [7 + n] * (3 + n)) for n in range(8)]
    ids, positions, _ = Packer(iter(examples * 100), 2, 48).next()
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        starts = (positions[0] == 0).nonzero()[:, 0].tolist()
        assert len(starts) > 3
        for start, end in pairwise(starts):
            alone = model(input_ids=ids[:1, start:end], use_cache=False).logits[0]
            torch.testing.assert_close(packed[0, start:end], alone, rtol=1e-4, atol=1e-5)


# -- what it learns from -----------------------------------------------------------------------


def texts(examples: Examples, count: int) -> list[tuple[str, str]]:
    return [
        (TOKENIZER.decode(each.prompt_ids), TOKENIZER.decode(each.response_ids))
        for each in islice(iter(examples), count)
    ]


def test_examples_are_templated_and_end() -> None:
    for prompt, response in texts(Examples(config_of(), TOKENIZER), 50):
        assert prompt.startswith("<user>")
        assert prompt.endswith("<assistant>")
        assert response.endswith("<end>")


def test_no_held_out_prompt_is_learnt_from() -> None:
    # Two terms of one digit: 200 problems, so most of them are in a held-out set of 256.
    small = SUMS.model_copy(update={"params": {**SUMS.params, "max_terms": 2}})
    config = config_of(small)
    held_out = build_mixture(config.data, config.eval.seed)
    kept_back = {held_out.problem(index).prompt for index in range(config.eval.prompts)}
    assert len(kept_back) > 50
    learnt = {prompt for prompt, _ in texts(Examples(config, TOKENIZER), 300)}
    assert not learnt & {f"<user>{prompt}<assistant>" for prompt in kept_back}


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_share_of_short_answers_is_the_one_asked_for(share: float) -> None:
    examples = Examples(config_of(SUMS), TOKENIZER)
    examples.short_share = share
    short = sum(response.startswith("=") for _, response in texts(examples, 400))
    assert short / 400 == pytest.approx(share, abs=0.08)


def test_tasks_without_solutions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "answer": 1}\n')
    task = TaskConfig(name="own", kind="jsonl", dataset=str(path))
    with pytest.raises(ConfigError, match="no solutions to learn from"):
        next(iter(Examples(config_of(task), TOKENIZER)))


def test_data_that_end_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "answer": 1}\n')
    data = DataConfig(tasks=(TaskConfig(name="own", kind="jsonl", dataset=str(path)),), epochs=1)
    config = Config(data=data, starter=StarterConfig(**TINY))
    with pytest.raises(ConfigError, match="the tasks end after"):
        next(iter(Examples(config, TOKENIZER)))


# -- fine-tuning -------------------------------------------------------------------------------


def test_learning_rate_warms_up_holds_and_falls() -> None:
    settings = StarterConfig(steps=100, warmup_steps=10)
    factors = [starter_training._lr_factor(step, settings) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == 1.0
    assert factors[10:35] == [1.0] * 25
    assert 0 < factors[-1] < 0.05
    assert factors[40:] == sorted(factors[40:], reverse=True)


def test_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        folder = ensure_starter(config_of(run={"seed": seed}))
        found: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        return found

    first, other = weights(0), weights(1)
    ensure_starter(config_of()).rename(cache_dir() / "moved")
    again = weights(0)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_loss_falls() -> None:
    losses = []
    ensure_starter(
        config_of(SUMS, starter={"steps": 40, "warmup_steps": 5}),
        lambda _step, loss: losses.append(loss),
    )
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


# -- cache and command -------------------------------------------------------------------------


def test_starter_loads_by_the_auto_classes_and_is_made_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_of()
    folder = ensure_starter(config)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (folder / "model.safetensors").is_file()
    assert model.config.model_type == "qwen3"
    assert model.dtype == torch.float32
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert (
        tokenizer("<user>1<assistant>")["input_ids"] == TOKENIZER("<user>1<assistant>")["input_ids"]
    )
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id

    def never(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(starter_training, "train_starter", never)
    assert ensure_starter(config) == folder


def test_key_follows_all_that_shapes_the_model() -> None:
    base = config_of()
    changed = [
        config_of(run={"seed": 1}),
        config_of(SUMS),
        config_of(starter={"steps": 3}),
        config_of(eval={"seed": 5}),
        config_of(model={"max_model_len_tokens": 150}),
    ]
    assert len({starter_key(config) for config in (base, *changed)}) == len(changed) + 1
    assert starter_key(config_of(starter={"threads": 2})) == starter_key(base)


def test_failure_leaves_nothing_that_looks_like_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_config: Config, folder: Path, _report: object) -> None:
        (folder / "config.json").write_text("{}")
        raise RuntimeError("power cut")

    monkeypatch.setattr(starter_training, "train_starter", fail)
    with pytest.raises(RuntimeError, match="power cut"):
        ensure_starter(config_of())
    assert list(cache_dir().iterdir()) == []


def test_faster_builder_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of()
    target = cache_dir() / f"qwen3-{starter_key(config)}"

    def train(_config: Config, folder: Path, _report: object) -> None:
        (folder / "config.json").write_text("mine")
        target.mkdir()
        (target / "config.json").write_text("the other's")

    monkeypatch.setattr(starter_training, "train_starter", train)
    assert ensure_starter(config) == target
    assert (target / "config.json").read_text() == "the other's"
    assert list(cache_dir().iterdir()) == [target]


def test_only_old_leftovers_are_removed() -> None:
    old, young = cache_dir() / ".building-old", cache_dir() / ".building-young"
    for folder in (old, young):
        folder.mkdir(parents=True)
    os.utime(old, (time.time() - 2 * starter._ABANDONED_S,) * 2)
    ensure_starter(config_of())
    assert (old.exists(), young.exists()) == (False, True)


CONFIG_TEXT = """
[data]
template = "<user>{prompt}<assistant>"
[[data.tasks]]
name = "equations"
kind = "mathematics"
[starter]
hidden_size = 32
num_layers = 1
num_heads = 1
num_kv_heads = 1
intermediate_size = 32
rows = 4
threads = 1
"""


def test_command_prints_the_folder_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.toml"
    path.write_text(CONFIG_TEXT)
    arguments = [str(path), "--set", "starter.steps=2"]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    folder = Path(shown.out.splitlines()[-1])
    assert (folder / "tokenizer.json").is_file()
    assert "step 2 of 2" in shown.err
    assert main([*arguments, "--print-path"]) == 0
    assert capsys.readouterr().out == f"{folder}\n"


def test_command_explains_a_wrong_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.toml"
    path.write_text(CONFIG_TEXT + "step = 3\n")
    assert main([str(path)]) == ConfigError.exit_code
    assert "starter.step" in capsys.readouterr().err
