"""The last lines of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ringasync.runtime.summary import read_summary, summary_lines

WHOLE = {
    "eval_reward_first": 0.4612,
    "eval_reward_last": 0.8499,
    "eval_reward_ci95": [[0.401, 0.521], [0.801, 0.889]],
    "train_reward_first": 0.5,
    "train_reward_last": 0.9,
    "steps": 200,
    "tokens_accepted": 1300000,
    "tokens_trained": 1228800,
    "ledger_balanced": True,
    "policy_versions": 201,
    "wall_s": 312.4,
}


def test_whole_summary_in_words(tmp_path: Path) -> None:
    (tmp_path / "report.html").touch()
    text = "\n".join(summary_lines(WHOLE, tmp_path))
    assert "0.461 [0.401, 0.521] -> 0.850 [0.801, 0.889]" in text
    assert "0.500 -> 0.900" in text
    assert "200, 201 policy versions" in text
    assert "1300000 generated, 1228800 trained" in text
    assert "312 s" in text
    assert "balanced" in text
    assert str(tmp_path / "report.html") in text


def test_unbalanced_ledger_is_loud(tmp_path: Path) -> None:
    assert "OUT OF BALANCE" in "\n".join(summary_lines({"ledger_balanced": False}, tmp_path))


@pytest.mark.parametrize("missing", WHOLE)
def test_summary_with_gaps_is_still_told(tmp_path: Path, missing: str) -> None:
    holed = {name: (None if name == missing else value) for name, value in WHOLE.items()}
    assert len(list(summary_lines(holed, tmp_path))) >= 4
    del holed[missing]
    assert len(list(summary_lines(holed, tmp_path))) >= 4


def test_summary_is_read_only_when_whole(tmp_path: Path) -> None:
    assert read_summary(tmp_path) is None
    (tmp_path / "summary.json").write_text('{"steps": 2')
    assert read_summary(tmp_path) is None
    (tmp_path / "summary.json").write_text(json.dumps(WHOLE))
    assert read_summary(tmp_path) == WHOLE
