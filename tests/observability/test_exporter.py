"""Prometheus metrics: what is served where, and that the docs list exactly that."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from ringasync.config.load import config_hash
from ringasync.config.schema import Config
from ringasync.coordinator.exported import note_line
from ringasync.observability.exporter import Exporter, exporting, ports_of
from ringasync.observability.families import FAMILIES
from tests.observability.scrape import Sample, free_ports, own_names, scrape

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
ROW = re.compile(r"^\| `(ringasync_\w+)` \| (\w+) \| ([^|]*) \|([^|]*)\| (.*) \|$", re.MULTILINE)


def with_port(port: int) -> Config:
    """A configuration with the metrics' first port."""
    return Config.model_validate(
        {
            "run": {"name": "m"},
            "data": {"tasks": [{"name": "sums", "kind": "mathematics"}]},
            "metrics": {"port": port},
        }
    )


@contextmanager
def listening(port: int) -> Iterator[None]:
    """Somebody else on the port."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        yield


def test_documented_metrics_are_the_exported_ones() -> None:
    documented = [
        (name, kind, tuple(roles.split(", ")), label.strip(), meaning)
        for name, kind, roles, label, meaning in ROW.findall(DOCS.read_text(encoding="utf-8"))
    ]
    assert documented == [(f.name, f.kind, f.roles, f.label, f.meaning) for f in FAMILIES]


def test_names_are_unique_and_say_their_kind() -> None:
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)
    wrong = [f.name for f in FAMILIES if f.name.endswith("_total") != (f.kind == "counter")]
    assert wrong == []
    for role in ("coordinator", "learner", "worker", "grader"):
        keys = [family.key for family in FAMILIES if role in family.roles]
        assert len(set(keys)) == len(keys), f"{role}: one value would be exported twice"


def test_metrics_do_not_make_another_run() -> None:
    assert config_hash(with_port(9464)) == config_hash(with_port(0))


async def test_served_values_are_those_set_and_added() -> None:
    port = free_ports()
    async with exporting(with_port(port), "worker", 'w"1\n') as exporter:
        exporter.set({"active": 3, "doing": "generating", "tokens_generated": 10, "grade_jobs": 1})
        exporter.set({"tokens_generated": 25, "policy_version": None, "swaps": float("nan")})
        samples = {sample.name: sample for sample in scrape(port + 2)}
    assert own_names(list(samples.values())) == {
        "ringasync_worker_active_rollouts",
        "ringasync_worker_generated_tokens_total",
        "ringasync_grader_jobs",
    }
    expected = Sample(
        "ringasync_worker_generated_tokens_total",
        {"run": "m", "role": "worker", "worker": 'w"1\n'},
        25.0,
    )
    assert samples[expected.name] == expected
    assert samples["process_resident_memory_bytes"].value > 1e6
    with pytest.raises(OSError, match="refused"):
        scrape(port + 2)


async def test_totals_add_up_and_split_by_label() -> None:
    port = free_ports()
    async with exporting(with_port(port), "learner") as exporter:
        exporter.add({"tokens_trained": 5, "seconds": {"train": 0.5, "wait": 1.0}})
        exporter.add({"tokens_trained": 7, "seconds": {"train": 0.25, "wait": None}, "other": 1})
        exporter.set({"gap_mean": 0.1, "loss": 2.0})
        exporter.set({"gap_mean": None})
        samples = scrape(port + 1)
    values = {
        (sample.name, sample.labels.get("part", "")): sample.value
        for sample in samples
        if sample.name.startswith("ringasync_")
    }
    assert values == {
        ("ringasync_learner_trained_tokens_total", ""): 12.0,
        ("ringasync_learner_seconds_total", "train"): 0.75,
        ("ringasync_learner_seconds_total", "wait"): 1.0,
        ("ringasync_learner_loss", ""): 2.0,
    }


async def test_workers_of_a_host_take_the_next_free_port() -> None:
    port = free_ports()
    config = with_port(port)
    with listening(port + 2):
        async with exporting(config, "worker", "a"), exporting(config, "grader", "b") as grader:
            grader.set({"grade_verdicts": 4})
            assert own_names(scrape(port + 4)) == {"ringasync_grader_verdicts_total"}
            assert own_names(scrape(port + 3)) == set()


async def test_a_taken_port_costs_a_warning_and_not_the_run() -> None:
    port = free_ports()
    with listening(port), capture_logs() as logs:
        async with exporting(with_port(port), "coordinator") as exporter:
            exporter.set({"learner_step": 1})
    assert [entry["event"] for entry in logs] == ["metrics are not served"]
    assert f"127.0.0.1:{port}" in logs[0]["why"]
    assert "metrics.port" in logs[0]["remedy"]


async def test_nothing_listens_unless_asked() -> None:
    with capture_logs() as logs:
        async with exporting(with_port(0), "coordinator") as exporter:
            exporter.set({"learner_step": 1})
    assert logs == []


def test_ports_of_roles_do_not_meet() -> None:
    metrics = with_port(9464).metrics
    assert list(ports_of(metrics, "coordinator")) == [9464]
    assert list(ports_of(metrics, "learner")) == [9465]
    assert ports_of(metrics, "worker") == ports_of(metrics, "grader") == range(9466, 9530)


def test_coordinator_exports_ends_of_training_groups_only() -> None:
    exporter = Exporter("m", "coordinator")
    line = {"kind": "outcome", "group_kind": "train", "end": "ready"}
    for more in ({}, {}, {"end": "stale"}, {"group_kind": "eval"}, {"rollout": "g1.0"}):
        note_line(exporter, {**line, **more})
    (metric,) = exporter.collect()
    assert {sample.labels["end"]: sample.value for sample in metric.samples} == {
        "ready": 2.0,
        "stale": 1.0,
    }
