"""metrics.jsonl, the summary and the numbers in it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringasync.broker.types import AuditReport, Outcome
from ringasync.coordinator.history import RunHistory, eval_group_id, eval_label
from ringasync.coordinator.metrics_file import MetricsFile, encode_line, read_lines
from ringasync.coordinator.recorder import metrics_line, outcome_line
from ringasync.coordinator.statistics import mean_interval
from ringasync.coordinator.summary import build_summary, train_rewards, write_summary


def step(number: int, at_ms: int, **more: Any) -> dict[str, Any]:
    return {"kind": "step", "stream": "metrics", "id": f"{at_ms}-0", "step": number, **more}


def outcome(group: str, at_ms: int, rewards: list[float], **more: Any) -> dict[str, Any]:
    kind = "eval" if group.startswith("e") else "train"
    fields = Outcome(
        entry_id=f"{at_ms}-0",
        group_id=group,
        kind=kind,  # type: ignore[arg-type]
        domain="d",
        end="evaluated" if kind == "eval" else "ready",
        rewards=tuple(rewards),
        lengths=tuple(10 for _ in rewards),
        versions=(1, 2),
        retention=0,
        reason="",
        at_ms=at_ms,
    )
    return {**outcome_line(fields), **more}


# The file


def test_a_torn_line_is_cut_and_the_rest_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(encode_line(step(1, 5)) + b'{"kind":"step","id":"7-0","st')
    file = MetricsFile(path)
    assert [line["step"] for line in file.open()] == [1]
    file.append([step(2, 9)])
    file.close()
    assert [line["step"] for line in read_lines(path)] == [1, 2]


def test_a_paused_predecessor_cannot_write_into_the_file_any_more(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    old, new = MetricsFile(path), MetricsFile(path)
    list(old.open())
    old.append([step(1, 5)])
    assert [line["step"] for line in new.open()] == [1]
    old.append([step(2, 6)])  # it wakes up
    new.append([step(3, 7)])
    assert [line["step"] for line in read_lines(path)] == [1, 3]
    old.close()
    new.close()


def test_what_is_no_json_number_becomes_null_and_surrogates_survive(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    assert list(file.open()) == []
    file.append([{"kind": "x", "loss": math.nan, "deep": {"a": [math.inf, 1.5]}, "t": "\ud800"}])
    file.close()
    [line] = read_lines(path)
    assert (line["loss"], line["deep"]) == (None, {"a": [None, 1.5]})


def test_writing_before_opening_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="not open"):
        MetricsFile(tmp_path / "m").append([])


def test_metrics_lines_bear_the_role_that_sent_them() -> None:
    assert metrics_line("1-0", {"role": "learner", "step": 3})["kind"] == "step"
    assert metrics_line("1-0", {"role": "worker", "tokens": 3})["kind"] == "worker"
    assert metrics_line("1-0", {"role": "learner", "kind": "alarm"})["kind"] == "alarm"


# History


def test_history_knows_where_each_stream_stopped() -> None:
    history = RunHistory()
    for line in [step(1, 5), outcome("g000001", 7, [1.0, 0.0]), step(2, 9), {"kind": "snapshot"}]:
        history.add(line)
    assert history.last_ids == {"metrics": "9-0", "outcomes": "7-0"}
    assert list(history.recent_lengths) == [10, 10]


def test_of_a_step_trained_again_the_last_line_counts() -> None:
    history = RunHistory()
    for line in [step(1, 5, mask_rate=0.5), step(2, 6, mask_rate=0.5), step(2, 8, mask_rate=0.1)]:
        history.add(line)
    assert {number: row["mask_rate"] for number, row in history.steps.items()} == {1: 0.5, 2: 0.1}


def test_a_replayed_step_keeps_the_time_it_was_first_made() -> None:
    history = RunHistory()
    for number in (1, 2, 3):
        history.add(outcome(f"g{number}", 100 * number - 50, [number / 10, number / 10]))
        history.add(step(number, 100 * number, loss=1.0))
    for number in (1, 2, 3):  # the learner lost its checkpoint
        history.add(step(number, 900 + number, loss=2.0))
    assert [(row["at_ms"], row["loss"]) for row in history.steps.values()] == [
        *((100, 2.0), (200, 2.0), (300, 2.0)),
    ]
    assert train_rewards(history) == (0.1, 0.3)


def test_a_replaced_rollout_is_no_end_of_its_group() -> None:
    history = RunHistory()
    history.add(outcome("g1", 5, [], end="purged", lengths=[30], rollout="g1.0"))
    history.add(outcome("g1", 6, [1.0, 0.0]))
    history.add(outcome("g2", 7, [], end="purged"))
    assert history.ends == {"ready": 1, "purged": 1}


def test_eval_outcomes_are_kept_by_label_and_without_verdict_as_none() -> None:
    history = RunHistory()
    history.add(outcome(eval_group_id("step40", 3), 5, [1.0]))
    history.add(outcome(eval_group_id("step40", 4), 6, [], lengths=[3]))
    history.add(outcome(eval_group_id("last", 0), 7, [0.5], end="grade_error"))
    results = history.eval_results
    assert results["step40"]["estep40-0003"].reward == 1.0
    assert results["step40"]["estep40-0004"].reward is None
    assert results["last"]["elast-0000"].reward is None
    assert history.sampled == []
    assert eval_label("estep40-0003") == "step40"


# The summary


def test_train_reward_is_of_all_groups_sampled_in_the_first_and_last_tenth() -> None:
    history = RunHistory()
    for number in range(1, 21):  # step k ends at 100 k ms; its tenth is two steps
        for at_ms, reward in ((100 * number - 60, 1.0), (100 * number - 50, 0.0)):
            level = reward if number > 18 else reward / 2
            history.add(outcome(f"g{at_ms}", at_ms, [level, level], end="filtered"))
        history.add(step(number, 100 * number))
    history.add(outcome("late", 5000, [0.0, 0.0]))  # after the last step: no step's
    assert train_rewards(history) == (0.25, 0.5)


def test_a_single_step_is_both_ends() -> None:
    history = RunHistory()
    history.add(outcome("g1", 50, [1.0, 0.5]))
    history.add(step(1, 100))
    assert train_rewards(history) == (0.75, 0.75)
    assert train_rewards(RunHistory()) == (None, None)


def test_summary_of_a_run_without_evaluation_or_steps_has_none_not_zero(tmp_path: Path) -> None:
    audit = AuditReport(True, 10, {"open": 10}, {"open": 10})
    history = RunHistory(first_ms=1000)
    summary = build_summary("r", history, audit, steps=0, latest_version=1, now_ms=3500)
    assert summary["eval_reward_first"] is None
    assert summary["eval_reward_ci95"] == [None, None]
    assert (summary["mask_rate_mean"], summary["wall_s"]) == (None, 2.5)
    loaded = json.loads(write_summary(tmp_path, summary).read_text())
    assert loaded["ledger_balanced"] is True


def sightings(*workers: tuple[str, int, int]) -> dict[str, Any]:
    """A snapshot of sessions: id, prompt tokens, cached ones; and a role that says nothing."""
    rows = [
        {"id": name, "prompt_tokens": str(given), "cached_prompt_tokens": str(cached)}
        for name, given, cached in workers
    ]
    return {"kind": "snapshot", "workers": [{"id": "coordinator.1"}, *rows]}


def test_prefills_are_added_up_over_workers_and_engines_built_anew() -> None:
    history = RunHistory(first_ms=1000)
    history.add(sightings(("a", 100, 40)))
    history.add(sightings(("a", 150, 60), ("b", 30, 0)))
    history.add(sightings(("a", 20, 5), ("b", 30, 0)))  # a's engine is another one now
    assert (history.prefills.prompt_tokens, history.prefills.cached_prompt_tokens) == (200, 65)
    audit = AuditReport(True, 90, {"trained": 90}, {"trained": 90})
    summary = build_summary("r", history, audit, steps=1, latest_version=1, now_ms=3500)
    assert (summary["prompt_tokens"], summary["prompt_tokens_cached"]) == (200, 65)
    assert summary["prefilled_per_trained_token"] == pytest.approx(135 / 90)


# Statistics


def test_wilson_against_a_published_example() -> None:
    # 15 of 20: Wilson's 95 % interval is 0.5313 to 0.8881 (Newcombe 1998's method 3).
    interval = mean_interval([1.0] * 15 + [0.0] * 5)
    assert interval is not None
    assert interval.method == "wilson"
    assert (interval.low, interval.high) == pytest.approx((0.5313, 0.8881), abs=5e-5)


def test_normal_for_graded_rewards() -> None:
    interval = mean_interval([0.0, 0.5, 1.0, 0.5])
    assert interval is not None
    half = 1.959964 * math.sqrt((0.5**2 + 0.5**2) / 3 / 4)
    assert interval.method == "normal"
    assert (interval.low, interval.high) == pytest.approx((0.5 - half, 0.5 + half))
    assert mean_interval([]) is None
    single = mean_interval([0.3])
    assert single is not None
    assert (single.low, single.high) == (0.3, 0.3)


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=300))
def test_wilson_stays_inside_zero_and_one_and_holds_the_mean(values: list[float]) -> None:
    interval = mean_interval(values)
    assert interval is not None
    assert 0.0 <= interval.low <= interval.mean + 1e-12
    assert interval.mean - 1e-12 <= interval.high <= 1.0
    assert interval.high > interval.low  # never a certainty
