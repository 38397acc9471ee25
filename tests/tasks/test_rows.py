"""JSON Lines files and hub data through the ``datasets`` library: a bad row is one bad row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ringasync.config.schema import DataConfig, TaskConfig
from ringasync.errors import BadPromptError, ConfigError
from ringasync.rewards.verifiers import verify
from ringasync.tasks.mixture import build_mixture
from ringasync.tasks.rows import RowSource, load_hub, load_jsonl


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The library caches by file name and time; a test must not see another one's rows."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def task_of(path: Path, **changes: Any) -> TaskConfig:
    fields: dict[str, Any] = {"name": "own", "kind": "jsonl", "dataset": str(path)}
    return TaskConfig(**{**fields, **changes})


def write(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


GOOD = {"prompt": "1+1?", "answer": "2"}


def test_rows_become_problems(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, {"prompt": "Grüße, 你好 \u2028?", "answer": 5})
    source = load_jsonl(task_of(path))
    assert source.size == 2
    assert [source.problem(i).prompt for i in range(2)] == ["1+1?", "Grüße, 你好 \u2028?"]
    assert verify(source.problem(0).task, r"so \boxed{2}") == 1.0
    assert verify(source.problem(1).task, r"\boxed{\frac{10}{2}}") == 1.0


def test_columns_are_named_by_settings(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "q", "solution": "yes"})
    task = task_of(path, prompt_field="question", answer_field="solution", verifier="exact")
    problem = load_jsonl(task).problem(0)
    assert (problem.prompt, verify(problem.task, " yes ")) == ("q", 1.0)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"prompt": "\xff\xfe", "answer": "1"}', "not UTF-8"),
        (b"[1, 2]", "not an object"),
        (b'"text"', "not an object"),
        ({"answer": "1"}, "'prompt' is None"),
        ({"prompt": "", "answer": "1"}, "'prompt' is ''"),
        ({"prompt": " \n ", "answer": "1"}, "not a text with something in it"),
        ({"prompt": 5, "answer": "1"}, "'prompt' is 5"),
        ({"prompt": ["a"], "answer": "1"}, "not a text"),
        (b'{"prompt": "\\ud800", "answer": "1"}', "cannot be stored"),
        (b'{"prompt": "a", "answer": "\\ud800"}', "cannot be stored"),
        (b'{"prompt": "a", "answer": NaN}', "cannot be stored"),
        ({"prompt": "a"}, "'answer' is None"),
        ({"prompt": "a", "answer": " "}, "not an answer to compare with"),
        ({"prompt": "a", "answer": None}, "not an answer to compare with"),
        ({"prompt": "a", "answer": True}, "not an answer to compare with"),
        ({"prompt": "a", "answer": ["1"]}, "not an answer to compare with"),
    ],
)
def test_bad_row_says_why_and_costs_no_other(tmp_path: Path, row: Any, complaint: str) -> None:
    source = load_jsonl(task_of(write(tmp_path / "a.jsonl", GOOD, row, GOOD)))
    with pytest.raises(BadPromptError, match=complaint):
        source.problem(1)
    assert source.problem(0).prompt == source.problem(2).prompt == "1+1?"


def test_deeply_nested_row_is_a_bad_row(tmp_path: Path) -> None:
    source = load_jsonl(task_of(write(tmp_path / "a.jsonl", GOOD, b"[" * 100_000)))
    with pytest.raises(BadPromptError):
        source.problem(1)


def test_users_function_gets_any_answer(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "a", "answer": [1, 2]}, {"prompt": "b"})
    source = load_jsonl(task_of(path, verifier="python:tests.rewards.bad_verifiers:good"))
    assert [source.problem(i).task["answer"] for i in range(2)] == [[1, 2], None]


@pytest.mark.parametrize("content", [None, b""])
def test_file_that_is_missing_or_empty_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "none.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"none\.jsonl"):
        load_jsonl(task_of(path))


def test_unknown_verifier_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(ConfigError, match="unknown verifier 'guess'"):
        load_jsonl(task_of(path, verifier="guess"))


def test_hub_kind_reads_a_folder_of_data_by_split(tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    write(folder / "train.jsonl", GOOD)
    write(folder / "test.jsonl", {"prompt": "2+2?", "answer": "4"}, GOOD)
    source = load_hub(task_of(folder, kind="hub", split="test"))
    assert isinstance(source, RowSource)
    assert (source.size, source.problem(0).prompt) == (2, "2+2?")


def test_hub_split_that_is_not_there_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    write(folder / "train.jsonl", GOOD)
    with pytest.raises(ConfigError, match="split 'dev' cannot be loaded"):
        load_hub(task_of(folder, kind="hub", split="dev"))


def test_file_and_generator_are_mixed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *({"prompt": f"q{i}", "answer": "1"} for i in range(10)))
    generated = TaskConfig(name="equations", kind="mathematics")
    mixture = build_mixture(DataConfig(tasks=(task_of(path), generated), epochs=1), 0)
    prompts = set()
    with suppress(IndexError):
        for index in range(1000):
            prompts.add(mixture.problem(index).prompt)
    assert {f"q{i}" for i in range(10)} < prompts
