"""Shares of the learner's time, from a metrics file as the coordinator writes it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.learner_wait import measure, newest_run, trained_steps, wall_s


def _step(at_ms: int, wait_s: float, train_s: float, **more: Any) -> dict[str, Any]:
    times = {"time_wait_s": wait_s, "time_train_s": train_s, "step_s": wait_s + train_s}
    return {"kind": "step", "stream": "metrics", "id": f"{at_ms}-0", **times, **more}


LINES = [
    {"kind": "start", "at_ms": 90_000},
    _step(95_000, 0.0, 3.0, step=1, replayed=True),
    _step(100_000, 1.0, 1.0, step=1),
    {"kind": "snapshot", "t_s": 11.0},
    _step(104_000, 2.0, 1.0, step=2, replayed=False),
    _step(108_000, 3.0, 1.0, step=3),
]


def _write(run_dir: Path, lines: list[dict[str, Any]], torn: str = "") -> Path:
    run_dir.mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in lines) + torn
    (run_dir / "metrics.jsonl").write_text(text)
    return run_dir


def test_shares_of_the_wall(tmp_path: Path) -> None:
    result = measure(_write(tmp_path / "run", LINES, torn='{"kind": "step", "ti'))
    # From 98.0 s (100.0 less the first step's 2.0) to 108.0 s; a replayed step is no waiting.
    assert result.figures["wall_s"] == pytest.approx(10.0)
    assert result.figures["steps"] == 3
    assert result.figures["share_of_wall"] == {
        "wait": pytest.approx(0.6),
        "train": pytest.approx(0.3),
        "other": pytest.approx(0.1),
    }
    assert [row[0] for row in result.tables[0].rows] == ["wait", "train", "other"]
    assert list(result.tables[0].rows[0][2:]) == [6.0, 2.0, 3.0]


def test_wall_of_one_step_is_its_own_time() -> None:
    assert wall_s(trained_steps([_step(5_000, 1.5, 0.5)])) == 2.0


@pytest.mark.parametrize("lines", [[], [LINES[0]], LINES[:2]])
def test_a_run_without_steps_is_refused(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="no trained step"):
        measure(_write(tmp_path / "run", lines))


def test_newest_run(tmp_path: Path) -> None:
    assert newest_run(tmp_path) is None
    import os

    for name, seconds in (("b", 200), ("a", 300), ("c", 100)):
        path = _write(tmp_path / name, LINES) / "metrics.jsonl"
        os.utime(path, (seconds, seconds))
    assert newest_run(tmp_path) == tmp_path / "a"


def test_command_writes_both_files(tmp_path: Path) -> None:
    run_dir = _write(tmp_path / "run", LINES)
    command = [sys.executable, "-m", "benchmarks.learner_wait", str(run_dir)]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, cwd=root
    )
    assert done.returncode == 0, done.stderr
    assert "| wait | 0.600 |" in done.stdout
    assert json.loads((tmp_path / "out.json").read_text())["results"][0]["figures"]["steps"] == 3
    missing = subprocess.run(
        [*command[:-1], str(tmp_path)], capture_output=True, text=True, cwd=root
    )
    assert missing.returncode == 2
    assert "no trained step" in missing.stderr
