"""What is computed of an arm's samples, by hand; the run itself is for a quiet machine."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks.goodput import Sample, Settings, Tally, Workers, prepare, tables
from ringasync.config.load import load_config


def test_figures_are_those_between_the_first_and_the_last_step() -> None:
    tally = Tally(
        [Sample(10.0, 500, 40.0, 1), Sample(14.0, 900, 75.0, 3), Sample(20.0, 1500, 130.0, 4)]
    )
    assert tally.figures(workers=10) == {
        "wall_s": 10.0,
        "steps": 2,
        "trained_tokens": 1000,
        "kills": 3,
        "dead_share": pytest.approx(0.1),
        "trained_per_live_s": pytest.approx(1000 / 90),
    }
    with pytest.raises(ValueError, match="only 2 steps"):
        Tally(tally.samples[:2]).figures(10)


def test_each_arm_is_put_beside_the_one_without_faults() -> None:
    one = {"wall_s": 9.0, "steps": 3, "trained_tokens": 90, "kills": 2, "dead_share": 0.1}
    found = {
        "no faults": {**one, "trained_per_live_s": 20.0},
        "killed": {**one, "trained_per_live_s": 19.0},
    }
    rows = tables(Settings(), found).tables[0].rows
    assert [row[2] for row in rows] == [1.0, pytest.approx(0.95)]


@pytest.mark.parametrize(("arm", "flush_tokens"), [("killed", 32), ("from the prompt", 1_000_000)])
def test_an_arms_run_is_one_that_the_product_takes(
    tmp_path: Path, arm: str, flush_tokens: int
) -> None:
    config = load_config(prepare(tmp_path, Settings(response_tokens=32), arm))
    assert config.worker.flush_tokens == flush_tokens
    assert config.worker.count == 0  # this benchmark starts them itself


def test_a_worker_is_killed_when_it_is_due_and_comes_back_after_the_pause(tmp_path: Path) -> None:
    settings = Settings(workers=1, life_s=1e-9, pause_s=3.0)
    workers = Workers(tmp_path / "none.toml", "redis://127.0.0.1:1/0", settings, "killed")
    now_s = time.monotonic()
    try:
        workers.turn(now_s)
        assert workers.alive() == {"w0-1"}
        workers.turn(now_s + 1)
        assert (workers.alive(), workers.kills) == (set(), 1)
        workers.turn(now_s + 3.9)
        assert workers.alive() == set()
        workers.turn(now_s + 4)
        assert workers.alive() == {"w0-2"}
    finally:
        workers.end()
    assert workers.alive() == set()
