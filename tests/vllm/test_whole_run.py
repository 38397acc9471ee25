"""A whole run with vLLM behind the worker: real processes, real Redis, a worker really killed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.test_colocated import events, learners_turns
from tests.e2e.test_whole_run import check_finished, steps_done
from tests.e2e.tiny_run import build_tiny_model, started, tiny_settings
from tests.vllm.kit import engine_processes

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

STEPS = 6


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.parametrize(
    "schedule",
    [{}, {"schedule__mode": "rounds", "schedule__colocated": True}],
    ids=["pipelined", "colocated"],
)
def test_a_run_with_vllm_trains_to_its_end_though_its_worker_is_killed(
    tmp_path: Path, tiny_model: Path, schedule: dict[str, Any]
) -> None:
    settings = tiny_settings(
        tmp_path,
        tiny_model,
        worker__engine="vllm",
        worker__count=1,
        worker__engine_options={"kv_cache_bytes": 64 << 20, "gather_ms": 5},
        learner__steps=STEPS,
        **schedule,
    )
    with started(tmp_path, settings) as run:
        run.wait_until(lambda: steps_done(run) >= 2, "step 2", timeout_s=300)
        worker = run.role_pids("worker")[0]
        children = engine_processes(worker)
        assert children, "the worker's engine has no process of its own"
        os.kill(worker, signal.SIGKILL)
        _, alive = psutil.wait_procs(children, timeout=20)
        assert alive == [], "EngineCore outlived its worker"
        assert run.wait(500) == 0, run.tail()
        check_finished(run, STEPS)
        lines = map(json.loads, (run.run_dir / "metrics.jsonl").read_text().splitlines())
        versions = [line["policy_version"] for line in lines if line["kind"] == "step"]
        assert len(set(versions)) == STEPS
        if schedule:
            assert len(learners_turns(run)) == STEPS + 1  # the first published version 1
            assert [event for event in events(run, "worker") if event["event"] == "awake"]
