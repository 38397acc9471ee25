"""The report: one file, complete, honest about what is missing, safe with names from outside."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from ringasync.observability.cost_plots import activity, busy_shares, cost_plots, generation_rate
from ringasync.observability.learning_plots import held_out, learning_plots
from ringasync.observability.plots import age_order, by_age, group_means, tokens_by_age
from ringasync.observability.report import tiles, write_report
from ringasync.observability.run_metrics import read_run

START_MS = 1_700_000_000_000


def _step(step: int) -> dict[str, Any]:
    ages = {"0": {"tokens": 900, "mask_rate": 0.001, "drift": 0.0}}
    ages["1"] = {"tokens": 100, "mask_rate": 0.01, "drift": -0.002 * step}
    return {
        "kind": "step",
        "id": f"{START_MS + 1000 * step}-0",
        "step": step,
        "train_reward": 0.4 + 0.002 * step,
        "loss": math.sin(step),
        "grad_norm": 1.0,
        "budget_fill": 0.98,
        "mask_rate": 0.002,
        "below_rate": 0.001,
        "above_rate": 0.001,
        "gap_mean": 1e-5,
        "gap_p99": 1e-4,
        "gap_max": None,
        "by_age": ages,
        "staleness_tokens": {age: entry["tokens"] for age, entry in ages.items()},
        "response_length_mean": 40.0,
        "response_length_p95": 80.0,
        "time_wait_s": 0.2,
        "time_train_s": 0.6,
        "step_s": 0.8,
        "tokens_per_s": 7000.0,
    }


def _outcome(step: int, end: str, domain: str = "sums", **more: Any) -> dict[str, Any]:
    line = {
        "kind": "outcome",
        "id": f"{START_MS + 1000 * step}-1",
        "group": f"g{step:06d}",
        "group_kind": "train",
        "domain": domain,
        "end": end,
        "rewards": [0.0, 1.0] if end == "ready" else [],
        "lengths": [30, 50],
    }
    return {**line, **more}


def _snapshot(t_s: float) -> dict[str, Any]:
    return {
        "kind": "snapshot",
        "t_s": t_s,
        "ledger": {"open": 100, "trained": int(5000 * t_s), "accepted": int(5000 * t_s) + 100},
        "queues": {"open_rollouts": 64, "ready_groups": 3},
        "workers": [
            {"role": "worker", "doing": "generating"},
            {"role": "worker", "doing": "fetching version 17"},
            {"role": "learner", "doing": "waiting: 200 of 6144 tokens"},
        ],
    }


def _eval(label: str, step: int, mean: float) -> dict[str, Any]:
    interval = [mean - 0.05, mean + 0.05]
    return {
        "kind": "eval",
        "label": label,
        "learner_step": step,
        "mean": mean,
        "ci95": interval,
        "n": 256,
    }


def _write(run_dir: Path, lines: list[dict[str, Any]], tail: str = "") -> None:
    run_dir.mkdir(exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run_dir / "metrics.jsonl").write_text(text + tail)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run of 100 steps."""
    lines: list[dict[str, Any]] = [{"kind": "start", "at_ms": START_MS}, _eval("first", 0, 0.42)]
    for step in range(1, 101):
        lines += [_step(step), _outcome(step, "ready"), _outcome(step, "filtered", "algebra")]
        lines += [_snapshot(2.0 * step)]
    lines += [_outcome(101, "grade_error", reason="boom"), _eval("last", 100, 0.84)]
    _write(tmp_path / "demo", lines)
    summary = {"steps": 100, "ledger_balanced": True, "tokens_accepted": 1_000_100, "wall_s": 200}
    (tmp_path / "demo" / "summary.json").write_text(json.dumps(summary))
    return tmp_path / "demo"


def test_one_self_contained_file_with_every_plot(run_dir: Path) -> None:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    page = path.read_text()
    assert page.count("Plotly.newPlot(") == 16
    assert "no data yet" not in page
    assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=", page), "nothing is loaded"
    assert len(re.findall(r"plotly\.js v\d", page)) == 1, "the library is in it once"
    assert [entry.name for entry in run_dir.iterdir() if "report" in entry.name] == ["report.html"]


def test_every_plot_has_a_sentence_that_stands_in_the_page(run_dir: Path) -> None:
    page = write_report(run_dir).read_text()
    metrics = read_run(run_dir)
    titles = [plot.title for plot in learning_plots(metrics) + cost_plots(metrics)]
    for expected in (
        "Reward",
        "Reward by domain",
        "Ends and errors by domain",
        "Response length",
        "Log-prob gap at age 0",
        "IcePop mask rate",
        "IcePop mask rate by token age",
        "Drift by token age",
        "Staleness",
        "Budget fill",
        "Tokens by account",
        "Learner's time",
        "Time by role",
        "Throughput",
    ):
        assert expected in titles
    for plot in learning_plots(metrics) + cost_plots(metrics):
        assert len(plot.sentence) > 20
        assert plot.sentence.split(".")[0].replace("'", "&#x27;") in page


def test_the_cost_of_contexts_is_told_where_it_is_known(run_dir: Path) -> None:
    metrics = read_run(run_dir)
    before = next(plot for plot in cost_plots(metrics) if plot.title == "Throughput").sentence
    metrics.summary |= {"prompt_tokens": 400, "prompt_tokens_cached": 100}
    metrics.summary["prefilled_per_trained_token"] = 1.5
    after = next(plot for plot in cost_plots(metrics) if plot.title == "Throughput").sentence
    assert "prefilled" not in before
    assert "trained token 1.50 tokens of context" in after
    assert "25% of all" in after


def test_utilization_has_a_plot_where_steps_have_it(run_dir: Path) -> None:
    metrics = read_run(run_dir)
    title = "Learner's utilization"
    assert title not in [plot.title for plot in cost_plots(metrics)]
    for line in metrics.steps:
        line["mfu"] = 0.25
    plot = next(plot for plot in cost_plots(metrics) if plot.title == title)
    assert "25.0%" in plot.sentence
    assert list(plot.figure.data[0].y) == [0.25] * len(metrics.steps)


def test_headline_numbers(run_dir: Path) -> None:
    shown = {name: (value, note) for name, value, note in tiles(read_run(run_dir))}
    assert shown["held-out reward"] == ("0.420 → 0.840", "95 %: 0.790 to 0.890, n = 256")
    assert shown["learner steps"][0] == "100"
    assert shown["tokens generated"][0] == "1M"
    assert shown["ledger"][0] == "balanced"
    assert shown["IcePop mask rate"][0] == "0.200%"
    assert shown["time"][0] == "3 min 20 s"


def test_numbers_by_age_are_weighted_by_tokens(run_dir: Path) -> None:
    metrics = read_run(run_dir)
    assert by_age(metrics, "mask_rate") == pytest.approx({"0": 0.001, "1": 0.01})
    assert by_age(metrics, "drift")["1"] == pytest.approx(-0.002 * 50.5)
    assert tokens_by_age(metrics) == {"0": 90_000, "1": 10_000}
    assert sorted(["10", "2", "16+", "0"], key=age_order) == ["0", "2", "10", "16+"]


def test_rewards_are_placed_at_the_step_of_their_time(run_dir: Path) -> None:
    steps, means = group_means(read_run(run_dir), lambda line: line["domain"])["sums"]
    assert set(means) == {0.5}
    assert steps[0] >= 0
    assert steps[-1] <= 101
    assert steps == sorted(steps)


def test_activities_are_told_apart_without_their_numbers(run_dir: Path) -> None:
    assert busy_shares(read_run(run_dir))["worker"] == {"generating": 0.5, "fetching version": 0.5}
    assert activity({"doing": "parking 12 rollouts: drain"}) == "parking rollouts"
    assert activity({"doing": "generating", "state": "late"}) == "late heartbeat"
    assert activity({}) == "not said"


def test_generation_rate_is_the_slope_of_accepted_tokens(run_dir: Path) -> None:
    _, rates = generation_rate(read_run(run_dir))
    assert rates == pytest.approx([5000.0] * len(rates))
    assert len(rates) == 33


def test_a_step_trained_again_counts_once(tmp_path: Path) -> None:
    _write(tmp_path, [_step(1), _step(2), _step(3), {**_step(2), "loss": 9.0}])
    metrics = read_run(tmp_path)
    assert [line["step"] for line in metrics.steps] == [1, 2, 3]
    assert metrics.steps[1]["loss"] == 9.0


def test_a_step_trained_again_keeps_the_time_of_the_first(tmp_path: Path) -> None:
    steps = [{**_step(n), "id": f"{1000 * n}-0"} for n in (1, 2, 3)]
    _write(tmp_path, [*steps, {**_step(2), "id": "9000-0", "loss": 9.0}])
    metrics = read_run(tmp_path)
    assert metrics.step_times_ms == [1000, 2000, 3000]
    assert metrics.step_at(2500) == 2
    assert metrics.steps[1]["loss"] == 9.0


def test_a_run_killed_in_the_middle_has_a_report(tmp_path: Path) -> None:
    _write(
        tmp_path,
        [_outcome(1, "evaluated", group=f"efirst-{i:04d}", group_kind="eval", rewards=[i % 2])
         for i in range(10)] + [_step(1)],
        tail='{"kind": "step", "st',
    )  # fmt: skip
    page = write_report(tmp_path).read_text()
    assert "This run is not finished" in page
    assert "1 lines of metrics.jsonl could not be read" in page
    (point,) = held_out(read_run(tmp_path))
    assert (point["mean"], point["n"], point["low"]) == (0.5, 10, None)
    assert "first (unfinished)" in page


@pytest.mark.parametrize("lines", [None, [], [{"kind": "start", "at_ms": START_MS}]])
def test_a_run_without_a_step_has_a_report(
    tmp_path: Path, lines: list[dict[str, Any]] | None
) -> None:
    if lines is not None:
        _write(tmp_path, lines)
    page = write_report(tmp_path).read_text()
    assert "The learner has made no step yet" in page
    assert page.count("no data yet") == 16


def test_fields_of_the_wrong_type_are_left_out(tmp_path: Path) -> None:
    odd = {**_step(1), "loss": "NaN", "by_age": None, "staleness_tokens": [], "mask_rate": True}
    _write(tmp_path, [odd, _step(2), {"kind": "snapshot"}, {"kind": "eval", "label": "x"}, {}])
    write_report(tmp_path)


def test_names_from_outside_cannot_become_markup(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    lines = [_step(1), _outcome(1, "ready", evil), _outcome(1, evil, evil)]
    _write(tmp_path, lines)
    (tmp_path / "summary.json").write_text(json.dumps({"run": evil}))
    assert "<script>alert(1)" not in write_report(tmp_path).read_text()
