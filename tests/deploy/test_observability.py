"""Alerts and dashboard ask for metrics and labels that the roles export, in PromQL that parses.

With ``promtool`` on PATH (Debian: package ``prometheus``) also its checks, and its tests of when
each alert fires.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from ringasync.observability.families import BASE_LABELS, FAMILIES

FOLDER = Path(__file__).parents[2] / "deploy" / "observability"
LABELS = {f.name: {*BASE_LABELS, *([f.label] if f.label else [])} for f in FAMILIES}
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((FOLDER / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
QUERIES = [
    pytest.param(expression, id=name)
    for name, expression in [
        *((rule["alert"], rule["expr"]) for rule in RULES),
        *(
            (f"{panel['title']}-{target['refId']}", target["expr"])
            for panel in PANELS
            for target in panel["targets"]
        ),
    ]
]


def parsed(expression: str) -> promql_parser.Expr:
    """Grafana's own interval is no PromQL; it puts a duration in its place."""
    return promql_parser.parse(expression.replace("$__rate_interval", "5m"))


def nodes(root: promql_parser.Expr) -> list[promql_parser.Expr]:
    found: list[promql_parser.Expr] = []

    def note(node: promql_parser.Expr) -> bool:
        found.append(node)
        return True

    promql_parser.walk(root, note)
    return found


def unknown(expression: str) -> Iterator[str]:
    """Metrics and labels in the expression that no role exports."""
    for node in nodes(parsed(expression)):
        if isinstance(node, promql_parser.VectorSelector):
            if node.name not in LABELS:
                yield str(node.name)
                continue
            labels = {matcher.name for matcher in node.matchers.matchers}
            yield from (f"{node.name}: {name}" for name in labels - LABELS[node.name])
    named = re.findall(r"(?:by|on)\s*\(([^)]*)\)", expression)
    grouped = {label.strip() for group in named for label in group.split(",")}
    yield from grouped - set().union(*LABELS.values())


@pytest.mark.parametrize("expression", QUERIES)
def test_query_parses_and_asks_for_what_is_exported(expression: str) -> None:
    assert list(unknown(expression)) == []
    assert any(isinstance(n, promql_parser.VectorSelector) for n in nodes(parsed(expression)))


@pytest.mark.parametrize(
    ("expression", "wrong"),
    [
        ("max by (run) (ringasync_stalled_total) > 0", "ringasync_stalled_total"),
        ('rate(ringasync_groups_ended_total{ends="x"}[$__rate_interval])',
         "ringasync_groups_ended_total: ends"),
        ("sum by (account, rum) (ringasync_ledger_tokens)", "rum"),
    ],
)  # fmt: skip
def test_a_wrong_name_would_be_noticed(expression: str, wrong: str) -> None:
    assert list(unknown(expression)) == [wrong]


def test_a_query_that_is_no_promql_would_be_noticed() -> None:
    with pytest.raises(ValueError, match="unclosed left parenthesis"):
        parsed("sum by (run (ringasync_stalled)")


def test_every_alert_says_how_bad_it_is_and_what_to_do() -> None:
    for rule in RULES:
        assert rule["labels"]["severity"] in ("warning", "critical"), rule["alert"]
        assert rule["annotations"].keys() == {"summary", "action"}, rule["alert"]
        assert "{{ $labels.run }}" in rule["annotations"]["summary"], rule["alert"]


def test_what_must_be_alerted_is() -> None:
    asked = " ".join(rule["expr"] for rule in RULES)
    for name in ("stalled", "learner_gap_mean_nats", "learner_mask_ratio",
                 "ledger_difference_tokens"):  # fmt: skip
        assert f"ringasync_{name}" in asked


def test_panels_lie_side_by_side_with_ids_of_their_own() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in PANELS)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_a_counter_is_never_shown_as_it_is() -> None:
    """It only rises and restarts at 0: what means something is its rate."""
    counters = {family.name for family in FAMILIES if family.kind == "counter"}
    for panel in PANELS:
        for target in panel["targets"]:
            for name in re.findall(r"ringasync_\w+", target["expr"]):
                assert name not in counters or f"rate({name}" in target["expr"], target["expr"]


@pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool on PATH")
@pytest.mark.parametrize(
    "arguments", [("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml")]
)
def test_promtool_agrees(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        ["promtool", *arguments], cwd=FOLDER, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
