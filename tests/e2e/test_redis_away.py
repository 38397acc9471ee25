"""What the probes of pods ask, of every role of a real run whose Redis stands still for a while."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.tiny_run import started, tiny_settings
from tests.observability.scrape import free_ports
from tests.observability.test_stalls import get

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]


def test_a_role_without_redis_is_not_well_but_needs_no_restart(
    tmp_path: Path, tiny_model: Path
) -> None:
    port = free_ports()
    settings = tiny_settings(
        tmp_path, tiny_model, learner__steps=500, grader__in_worker=False, worker__count=1
    )
    settings["metrics"] = {"port": port}
    settings["observability"]["stall_report_s"] = 3.0

    def answers(path: str) -> dict[str, tuple[int, dict[str, Any]]]:
        """Status and words of every role that serves by now."""
        found = {}
        for each in range(port, port + 4):
            try:
                code, said = get(each, path)
            except OSError:
                continue
            if said["doing"] != "starting":
                found[said["role"]] = code, said
        return found

    with started(tmp_path, settings) as run:
        run.wait_until(lambda: len(answers("/healthz")) == 4, "four roles at work", 90)
        [redis] = run.redis_processes()
        redis.suspend()
        try:

            def owed_by_redis() -> bool:
                found = answers("/healthz").values()
                return len(found) == 4 and all(
                    code == 503 and "owed by Redis" in str(said["stalls"]) for code, said in found
                )

            run.wait_until(owed_by_redis, "four roles that lack Redis", 30)
            alive = answers("/livez")
            assert {role: code for role, (code, _) in alive.items()} == dict.fromkeys(
                ("coordinator", "learner", "worker", "grader"), 200
            )
        finally:
            redis.resume()

        def well() -> bool:
            found = answers("/healthz").values()
            return len(found) == 4 and all(
                "owed by Redis" not in str(said["stalls"]) for _, said in found
            )

        run.wait_until(well, "heartbeats of four roles", 60)
