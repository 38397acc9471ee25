"""`ringasync ui` as a client sees it: what it shows, and that it shows only and changes nothing."""

from __future__ import annotations

import asyncio
import html
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis

from ringasync.broker import access
from ringasync.broker.embedded import EmbeddedRedis
from ringasync.broker.keys import Keys
from ringasync.ui.app import HEADERS
from tests.conftest import RedisServer
from tests.redis_process import redis_process
from tests.ui.site import GROUPS, HOSTILE, STEPS, Site, fill, filled, serving

PAGES = ("/", "/now", "/rollouts", "/rollouts?page=2", "/rollout/g000000.1", "/samples")


def words(text: str) -> str:
    """A page's text as a reader sees it."""
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text)))


def test_live_view_shows_reward_queues_workers_staleness_ledger_and_stalls(site: Site) -> None:
    page = site.get("/")
    assert page.status == 200
    shown = words(page.text)
    for expected in (
        f"training reward {1.0:.3f}",
        f"steps 1 to {STEPS}, 0.042 to 1.000",
        "staleness, mean, steps 1.50",
        "IcePop mask rate 0.100%",
        f"groups open {GROUPS - 1}",
        "groups ready 1",
        "tokens ready 16",
        "32 accepted tokens, each in one account",
        "graded 16 50.0 %",
        "31 s: tokens",
    ):
        assert expected in shown
    assert '<polyline points="0.0,76.0' in page.text, "the lowest reward comes first"


def test_the_refreshed_part_is_in_the_page(site: Site) -> None:
    part = site.get("/now")
    assert part.status == 200
    assert "<html" not in part.text
    assert words(part.text) in words(site.get("/").text)


def test_rollouts_are_listed_newest_first_in_pages(site: Site) -> None:
    first, second = (site.get(f"/rollouts?page={page}").text for page in (1, 2))
    ids = re.findall(r'href="/rollout/(g\d+\.\d)"', first + second)
    assert ids == [f"g{n:06}.{i}" for n in reversed(range(GROUPS)) for i in (0, 1)]
    assert f"{GROUPS} groups" in words(first)
    assert "page 2 of 2" in words(second)
    assert "graded 8" in words(second)
    assert "parked 8" in words(second)


@pytest.mark.parametrize("page", ["0", "-1", "x", "99999999999999999999", "%C2%B2", ""])
def test_a_page_that_is_none_is_the_first(site: Site, page: str) -> None:
    assert "page 1 of 2" in words(site.get(f"/rollouts?page={page}").text)


def test_one_rollouts_life_is_told(site: Site) -> None:
    shown = words(site.get("/rollout/g000000.1").text)
    for event in ("leased", "finished", "graded"):
        assert re.search(rf"\d\d:\d\d:\d\d \d+\.\d s {event}", shown), event
    assert "reward 1" in shown
    assert "Its answer, reward 1" in shown


@pytest.mark.parametrize("path", ["/rollout/g999999.0", "/find?id=nothing%20like%20it", "/nowhere"])
def test_what_is_not_there_is_a_404_that_says_so(site: Site, path: str) -> None:
    answer = site.get(path)
    assert answer.status == 404
    assert "Not to be shown" in answer.text


def test_search_leads_to_the_rollout(site: Site) -> None:
    answer = site.get("/find?id=+g000000.1+")
    assert (answer.status, answer.headers["location"]) == (303, "/rollout/g000000.1")


@pytest.mark.parametrize(
    "path",
    [
        "/rollout/..%2f..%2fmeta",
        "/rollout/" + "g" * 500,
        "/rollout/*",
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/static/..%2fapp.py",
    ],
)
def test_paths_lead_nowhere_else(site: Site, path: str) -> None:
    answer = site.get(path)
    assert answer.status == 404
    assert "SafeHeaders" not in answer.text


@pytest.mark.parametrize("path", PAGES)
def test_text_from_outside_is_text(site: Site, path: str) -> None:
    """Prompts, answers, domains, names and reasons of this run are all markup that would run."""
    answer = site.get(path)
    assert answer.status == 200
    assert HOSTILE in html.unescape(answer.text), "the test shows nothing hostile"
    assert "<img" not in answer.text
    assert re.findall(r"<script[^>]*>", answer.text) in (
        [],
        ['<script src="/static/live.js" defer>'],
    )
    assert not re.search(r"<[^>]*\son\w+\s*=", answer.text), "a handler in a tag"
    assert not re.search(r"<[^>]*\sstyle\s*=", answer.text), "the policy forbids it"


@pytest.mark.parametrize("path", [*PAGES, "/find?id=g000000.1", "/static/live.js"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_only_get_is_answered(site: Site, path: str, method: str) -> None:
    assert site.get(path, method).status == 405


@pytest.mark.parametrize("path", [*PAGES, "/nowhere", "/static/style.css", "/rollout/none.0"])
def test_every_answer_bears_the_policy(site: Site, path: str) -> None:
    headers = site.get(path).headers
    assert {name: headers.get(name) for name in HEADERS} == HEADERS
    assert "server" not in headers


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "10.0.0.1"])
def test_another_sites_name_for_this_address_is_refused(site: Site, host: str) -> None:
    assert site.get("/", host=host).status == 400
    assert HOSTILE not in html.unescape(site.get("/samples", host=host).text)


def test_looking_changes_nothing(site: Site) -> None:
    client = redis.Redis.from_url(site.redis_url)
    prefix = Keys(site.run).prefix

    def contents() -> dict[bytes, bytes | None]:
        # The clock's last reading is the one thing that any script, reads included, keeps.
        names = sorted(client.scan_iter(f"{prefix.replace('{', '[{]')}*", 1000))
        return {name: client.dump(name) for name in names if not name.endswith(b"}:clock")}

    before = contents()
    assert len(before) > GROUPS
    for path in (*PAGES, "/find?id=g000000.1", "/rollout/none.0"):
        site.get(path)
    assert contents() == before
    client.close()


def test_a_taken_port_and_a_run_that_is_not_there_are_said(site: Site) -> None:
    taken = str(urlsplit(site.url).port)
    for run, port, said, code in (
        (site.run, taken, f"127.0.0.1:{taken} cannot be listened on", 3),
        ("t-none", "0", "run 't-none' does not exist", 1),
    ):
        command = [sys.executable, "-m", "ringasync", "ui", "--run", run, "--port", port]
        done = subprocess.run(
            [*command, "--redis-url", site.redis_url], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == code, done.stderr
        assert said in done.stderr


def test_the_operators_rights_are_enough(any_redis: RedisServer, tmp_path: Path) -> None:
    """Under the user that `ringasync acl` makes for the person at the command line."""
    passwords = {name: f"password-of-the-{name}" for name in ("operator", "admin")}
    users = tmp_path / "users.acl"
    users.write_text(access.users(int(any_redis.version.split(".")[0]), passwords))
    with redis_process(any_redis.binary, tmp_path, "--aclfile", str(users)) as port:
        url = f"redis://127.0.0.1:{port}/0"
        asyncio.run(fill(url, "t-acl", passwords["admin"]))
        name, password = f"{access.USER_PREFIX}operator", passwords["operator"]
        as_operator = {"RINGASYNC_REDIS_USERNAME": name, "RINGASYNC_REDIS_PASSWORD": password}
        with serving(url, "t-acl", **as_operator) as site:
            assert {path: site.get(path).status for path in PAGES} == dict.fromkeys(PAGES, 200)


def test_redis_away_is_said_over_what_was_last_seen(any_redis: RedisServer, tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path / "redis", 1 << 28, binary=any_redis.binary)
    url = server.start_blocking()
    try:
        with filled(url, "t-away") as site:
            assert site.get("/").status == 200
            server.stop_blocking()
            deadline = time.monotonic() + 20
            while "What is shown is old." not in (shown := words(site.get("/").text)):
                assert time.monotonic() < deadline, shown  # one snapshot serves for a while
            assert f"groups open {GROUPS - 1}" in shown
            assert site.get("/samples").status == 503
            site.process.send_signal(signal.SIGINT)
            assert site.process.wait(20) == 130
    finally:
        server.stop_blocking()
