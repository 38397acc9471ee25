"""The measurements of the page and of the metrics' cost, tiny but real."""

from __future__ import annotations

import pytest

from benchmarks import metrics_cost, ui_pages, worker


def test_pages_are_asked_for_and_hold_the_run() -> None:
    settings = ui_pages.Settings(rollouts=160, sessions=2, steps=3, outcomes=5, requests=1)
    figures = ui_pages.measure(settings).figures
    assert {"/", "/now", "/rollouts", "/samples"} < figures.keys()
    assert figures["worst_ms"] >= figures["/"]["first_ms"] > 0
    (rollout,) = (page for page in figures if page.startswith("/rollout/"))
    assert figures[rollout]["bytes"] > 500


async def test_both_arms_generate_and_one_is_scraped() -> None:
    work = worker.Settings(engine="scripted", rollouts=32, concurrent=8)
    settings = metrics_cost.Settings(rounds=2, scrape_every_s=0.02, work=work)
    figures = (await metrics_cost.measure(settings)).figures
    assert figures["scrapes"] > 0
    assert len(figures["tokens_per_s_on"]) == len(figures["tokens_per_s_off"]) == 2
    assert 0 < figures["share_of_a_core"] < 1


def test_an_interval_is_around_the_mean_and_narrows() -> None:
    few, many = (metrics_cost.mean_ci95([0.9, 1.1] * n) for n in (2, 50))
    assert few[0] == many[0] == pytest.approx(1.0)
    assert few[1] < many[1] < 1.0 < many[2] < few[2]
