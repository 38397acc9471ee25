"""The page in a real browser: it draws, it follows the run, and hostile text stays text.

Needs the package ``playwright`` and a Chromium: its own, or one on PATH.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import redis

from ringasync.broker.keys import Keys
from tests.ui.site import HOSTILE, Site

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    with api.sync_playwright() as playwright:
        if found is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("no Chromium: `playwright install chromium`, or the system's package")
        # Chromium's sandbox does not start for root.
        started = playwright.chromium.launch(
            executable_path=found, chromium_sandbox=os.geteuid() != 0
        )
        yield started
        started.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page whose console must stay empty, and that asks no other host."""
    shown = browser.new_page(viewport={"width": 1200, "height": 900})
    complaints: list[str] = []
    asked: list[str] = []
    shown.on("console", lambda message: complaints.append(message.text))
    shown.on("pageerror", lambda error: complaints.append(str(error)))
    shown.on("dialog", lambda dialog: complaints.append(dialog.message))
    shown.on("request", lambda request: asked.append(request.url))
    yield shown
    first = asked[0].split("/")[2]
    assert {url.split("/")[2] for url in asked} == {first}
    assert complaints == []
    shown.close()


def test_live_view_draws_and_follows_the_run(page: Page, site: Site, tmp_path: Path) -> None:
    page.goto(site.url)
    chart = page.locator("figure", has_text="training reward").locator("polyline")
    box = chart.bounding_box()
    assert box is not None
    assert box["width"] > 200
    assert box["height"] > 30
    assert page.locator("#now tr", has_text="worker-1").count() == 1
    client = redis.Redis.from_url(site.redis_url)
    meta = Keys(site.run).meta
    try:
        client.hset(meta, "learner_step", 77)
        page.get_by_text("77 of 200").wait_for(timeout=10_000)
    finally:
        client.hset(meta, "learner_step", 0)
        client.close()
    assert len(page.screenshot(path=tmp_path / "live.png", full_page=True)) > 20_000


def test_hostile_text_is_shown_and_does_not_run(page: Page, site: Site) -> None:
    for path in ("", "samples", "rollouts", "rollout/g000000.1"):
        page.goto(site.url + path)
        page.get_by_text(HOSTILE).first.wait_for(timeout=5000)
        assert "owned" not in page.title()
        assert page.locator("img").count() == 0


def test_from_the_list_to_one_rollouts_life(page: Page, site: Site) -> None:
    page.goto(site.url + "rollouts?page=2")
    page.get_by_title("g000000.1").click()
    page.wait_for_url("**/rollout/g000000.1")
    assert page.locator("table").nth(1).locator("tr").count() == 4, "a heading and three events"
    page.get_by_label("rollout").fill("g000000.0")
    page.get_by_label("rollout").press("Enter")
    page.wait_for_url("**/rollout/g000000.0")


def test_a_server_that_went_away_is_said(browser: Browser, site: Site) -> None:
    shown = browser.new_page()
    shown.goto(site.url)
    assert shown.locator("#away").is_hidden()
    shown.route("**/now", lambda route: route.abort())
    shown.get_by_text("does not answer").wait_for(timeout=10_000)
    shown.close()
