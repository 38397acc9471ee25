"""The coordinator from the first evaluation to the summary, with everybody else by hand."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

from ringasync.broker.client import Broker
from ringasync.config.schema import Config
from ringasync.coordinator.app import Coordinator, Place
from ringasync.runtime.shutdown import Shutdown
from tests.coordinator.crew import (
    Crew,
    assert_each_entry_once,
    fed_indices,
    make_config,
    metrics,
    words_source,
)


async def run_to_end(config: Config, url: str, broker: Broker) -> Crew:
    """Coordinate a run with a crew; returns the crew once the coordinator has ended with 0."""
    crew = Crew(broker, config)
    place = Place(url, "none")
    coordinating = asyncio.create_task(
        Coordinator(config, place, Shutdown(), source=words_source).run()
    )
    await crew.join()
    working = asyncio.create_task(crew.work())
    assert await asyncio.wait_for(coordinating, 60) == 0
    await asyncio.wait_for(working, 10)
    return crew


@pytest.mark.parametrize("mode", ["pipelined", "rounds"])
async def test_a_run_ends_with_both_evaluations_and_a_summary(
    tmp_path: Path, run_name: str, redis_url: str, live: Broker, mode: str
) -> None:
    config = make_config(tmp_path, run_name, schedule__mode=mode)
    crew = await run_to_end(config, redis_url, live)
    assert crew.steps_trained == 4
    lines = metrics(config)
    assert_each_entry_once(lines)
    evals = {line["label"]: line for line in lines if line["kind"] == "eval"}
    assert evals.keys() == {"first", "last"}
    assert evals["first"]["version"] == 1
    assert evals["last"]["version"] == 5  # the one that the fourth step made
    assert [evals[label]["n"] for label in ("first", "last")] == [8, 8]
    summary = json.loads((config.run_dir / "summary.json").read_text())
    assert summary["steps"] == 4
    assert summary["ledger_balanced"] is True
    assert summary["mask_rate_mean"] == 0.25
    assert summary["policy_versions"] == 5
    assert summary["eval_reward_first"] == evals["first"]["mean"]
    low, high = summary["eval_reward_ci95"][1]
    assert low <= summary["eval_reward_last"] <= high
    assert 0.0 <= summary["train_reward_first"] <= 1.0
    assert summary["tokens_trained"] >= 4 * 64
    assert summary["tokens_accepted"] == (await live.ledger())["accepted"]
    fed = await fed_indices(live)
    assert sorted(fed.values()) == list(range(len(fed)))  # nothing skipped, nothing twice
    assert all(group_id == f"g{index:06d}" for group_id, index in fed.items())
    meta = await live.run_meta()
    assert (meta["phase"], meta["pin_version"]) == ("done", "")
    assert (config.run_dir / "report.html").is_file()


async def test_a_run_is_done_also_where_its_report_cannot_be_written(
    tmp_path: Path, run_name: str, redis_url: str, live: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "ringasync.observability.report", raising=False)
    monkeypatch.setitem(sys.modules, "plotly.io", None)  # as if it were not installed
    config = make_config(tmp_path, run_name)
    await run_to_end(config, redis_url, live)
    assert json.loads((config.run_dir / "summary.json").read_text())["ledger_balanced"] is True
    assert not (config.run_dir / "report.html").exists()
    assert (await live.run_meta())["phase"] == "done"
