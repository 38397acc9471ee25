"""Every role of a real run is scraped: it exports what the table says, and the values are true."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringasync.observability.families import FAMILIES
from tests.e2e.tiny_run import TinyRun, started, tiny_settings
from tests.observability.scrape import Sample, free_ports, own_names, scrape

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

NOT_HERE = {"ringasync_learner_mfu_ratio", "ringasync_learner_gap_mean_nats",
            "ringasync_learner_gap_p99_nats"}  # fmt: skip
"""A CPU has no known peak; whether the last step had tokens of age 0 is chance."""
ROLES = ("coordinator", "learner", "worker", "grader")


def family_names(role: str) -> set[str]:
    """What the table says of a role whose grader is a process of its own."""
    of_role = (f.name for f in FAMILIES if role in f.roles and (role == f.roles[0]))
    return set(of_role) - NOT_HERE


def scraped(first_port: int) -> dict[str, list[Sample]]:
    """Samples by role, of whoever serves by now."""
    found: dict[str, list[Sample]] = {}
    for port in range(first_port, first_port + 5):
        try:
            samples = scrape(port)
        except OSError:
            continue
        for sample in samples:
            if "role" in sample.labels:
                found.setdefault(sample.labels["role"], []).append(sample)
    return found


def all_there(first_port: int) -> bool:
    """Whether every role exports all of its metrics."""
    found = scraped(first_port)
    return all(own_names(found.get(role, [])) - NOT_HERE == family_names(role) for role in ROLES)


def value(samples: list[Sample], name: str, **labels: str) -> float:
    """The sum over all processes of the role."""
    chosen = [s for s in samples if s.name == name and labels.items() <= s.labels.items()]
    assert chosen, name
    return sum(sample.value for sample in chosen)


def check_values(found: dict[str, list[Sample]]) -> None:
    """Figures of one scrape that must fit together, whatever the run does meanwhile."""
    coordinator, learner = found["coordinator"], found["learner"]
    assert value(coordinator, "ringasync_ledger_difference_tokens") == 0
    assert value(coordinator, "ringasync_sessions", of_role="worker") == 2
    assert value(coordinator, "ringasync_accepted_tokens_total") > 1024
    trained = value(learner, "ringasync_learner_trained_tokens_total")
    assert trained >= 1024  # two steps at least, each of most of Phi
    assert trained == value(learner, "ringasync_learner_tokens_by_age_total")
    workers = found["worker"]
    assert {s.labels["worker"] for s in workers} == {"worker-1", "worker-2"}
    assert value(workers, "ringasync_worker_generated_tokens_total") >= trained
    swap_s = value(workers, "ringasync_worker_swap_seconds_total")
    paused_s = value(workers, "ringasync_worker_swap_paused_seconds_total")
    assert 0 < paused_s < swap_s
    assert value(found["grader"], "ringasync_grader_verdicts_total") > 0


def logs(run: TinyRun) -> str:
    """What the roles logged."""
    return "".join(path.read_text(errors="replace") for path in run.run_dir.glob("logs/*"))


def test_every_role_exports_what_the_table_says(tmp_path: Path, tiny_model: Path) -> None:
    port = free_ports()
    settings = tiny_settings(
        tmp_path, tiny_model, learner__steps=500, grader__in_worker=False, eval__prompts=4
    )
    settings["metrics"] = {"port": port}
    with started(tmp_path, settings) as run:
        wanted = {role: family_names(role) for role in ROLES}
        try:
            run.wait_until(lambda: all_there(port), "a whole scrape of every role", 100)
        except AssertionError:
            found = scraped(port)
            assert {role: own_names(found.get(role, [])) - NOT_HERE for role in ROLES} == wanted
            raise
        run.wait_until(lambda: has_steps(port, 2), "two steps")
        check_values(scraped(port))
    assert "metrics are served" in logs(run)


def has_steps(port: int, steps: int) -> bool:
    """Whether the learner has made so many steps and both workers swapped weights."""
    found = scraped(port)
    swaps = value(found["worker"], "ringasync_worker_swaps_total")
    return value(found["learner"], "ringasync_learner_steps_total") >= steps and swaps >= 2
