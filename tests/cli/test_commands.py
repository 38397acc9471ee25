"""The command line as a person meets it: real processes, a real embedded Redis."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ringasync.broker.client import Broker
from ringasync.broker.embedded import EmbeddedRedis
from ringasync.broker.types import NewGroup
from ringasync.cli.main import app
from ringasync.config.load import config_hash, load_config, resolved_json
from ringasync.runtime.runfiles import RunRecord

COMMANDS = (
    *("up", "coordinator", "worker", "learner", "grader", "redis"),
    *("top", "inspect", "samples", "audit", "report", "replay", "health"),
    *("init", "config", "pause", "resume", "rm", "export"),
)
TEXT = """
[run]
name = "small"
dir = "{runs}"
[[data.tasks]]
name = "sums"
kind = "mathematics"
"""


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


async def ringasync(*arguments: str, cwd: Path, stdin: str = "") -> Answer:
    """Run the command as a process, the way a shell would."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RINGASYNC_")}
    environment |= {"COLUMNS": "200", "NO_COLOR": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "ringasync", *arguments),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=cwd,
        env=environment,
    )
    out, err = await asyncio.wait_for(process.communicate(stdin.encode()), 60)
    answer = Answer(process.returncode or 0, out.decode(), err.decode())
    assert "Traceback" not in answer.err, answer.err
    return answer


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(TEXT.format(runs=tmp_path / "runs"), encoding="utf-8")
    return path


@pytest.fixture
async def live_run(tmp_path: Path, config_path: Path) -> AsyncIterator[Path]:
    """Folder of a run that is up: its embedded Redis answers and knows it."""
    config = load_config(config_path)
    server = EmbeddedRedis(config.run_dir / "redis", 64 << 20)
    url = await server.start()
    broker = await Broker.connect(url, "small")
    await broker.create_run(resolved_json(config), config_hash(config))
    await broker.close()
    RunRecord("small", str(config_path), config_hash(config), url, "m").write(config.run_dir)
    yield config.run_dir
    await server.stop()


def shown(*arguments: str) -> str:
    """What a command prints, in this process: for help, which starts nothing."""
    answer = CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert answer.exit_code == 0, answer.output
    return answer.output


def test_help_names_every_command_and_the_exit_codes() -> None:
    out = shown("--help")
    for command in COMMANDS:
        assert f" {command} " in out
    for code in ("0 done", "2 configuration", "3 surroundings", "130 stopped"):
        assert code in out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_an_example_and_exit_codes(command: str) -> None:
    out = shown(command, "--help")
    assert f"ringasync {command}" in out.split("Example", 1)[1]
    assert "Exit codes" in out


async def test_version(tmp_path: Path) -> None:
    answer = await ringasync("--version", cwd=tmp_path)
    assert answer.out.startswith("ringasync 0.")


async def test_config_prints_toml_that_loads_back(tmp_path: Path, config_path: Path) -> None:
    answer = await ringasync("config", str(config_path), "--set", "run.seed=4", cwd=tmp_path)
    assert answer.code == 0
    assert tomllib.loads(answer.out)["run"]["seed"] == 4
    assert "open tokens, at most" in answer.out
    again = tmp_path / "again.toml"
    again.write_text(answer.out, encoding="utf-8")
    assert load_config(again) == load_config(config_path, ["run.seed=4"])


async def test_config_prints_json(tmp_path: Path, config_path: Path) -> None:
    answer = await ringasync("config", str(config_path), "--format", "json", cwd=tmp_path)
    data = json.loads(answer.out)
    assert data["config"]["run"]["name"] == "small"
    assert data["config_hash"] == config_hash(load_config(config_path))
    assert {"name", "value", "formula"} == set(data["derived"][0])


async def test_config_check_prints_the_arithmetic(tmp_path: Path, config_path: Path) -> None:
    model = tmp_path / "other.json"
    model.write_text(
        '{"model_type": "qwen3", "vocab_size": 10, "hidden_size": 4, "num_hidden_layers": 1, '
        '"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2, '
        '"intermediate_size": 8, "tie_word_embeddings": true}',
        encoding="utf-8",
    )
    check = ("config", str(config_path), "--check")
    answer = await ringasync(*check, "--model-config", str(model), "--format", "json", cwd=tmp_path)
    figures = {each["name"]: each["value"] for each in json.loads(answer.out)["arithmetic"]}
    assert figures["parameters"] == "200"
    table = await ringasync(*check, "--model-config", str(model), cwd=tmp_path)
    assert "learner: together" in table.out
    missing = await ringasync(*check, "--model-config", "nothing.json", cwd=tmp_path)
    assert missing.code == 2
    assert "--model-config nothing.json" in missing.err


async def test_config_check_only_validates(tmp_path: Path, config_path: Path) -> None:
    assert "valid" in (await ringasync("config", str(config_path), "--check", cwd=tmp_path)).out
    wrong = await ringasync(
        "config", str(config_path), "--check", "--set", "learner.lrr=1", cwd=tmp_path
    )
    assert wrong.code == 2
    assert "did you mean learner.lr?" in wrong.err
    assert str(config_path) in wrong.err


@pytest.mark.parametrize("command", ["up", "worker", "learner", "coordinator", "grader", "redis"])
async def test_wrong_configuration_stops_every_role_with_2(
    tmp_path: Path, config_path: Path, command: str
) -> None:
    answer = await ringasync(command, str(config_path), "--set", "run.seed=-1", cwd=tmp_path)
    assert answer.code == 2
    assert "run.seed = -1" in answer.err
    assert not (tmp_path / "runs").exists()


async def test_role_of_a_run_that_is_not_up_says_how_to_start_it(
    tmp_path: Path, config_path: Path
) -> None:
    answer = await ringasync("worker", str(config_path), cwd=tmp_path)
    assert answer.code == 2
    assert "run 'small' is not up" in answer.err
    assert "ringasync up" in answer.err


async def test_role_without_a_starting_model_says_how_to_name_it(
    tmp_path: Path, config_path: Path
) -> None:
    answer = await ringasync(
        "worker", str(config_path), "--redis-url", "redis://127.0.0.1:1", cwd=tmp_path
    )
    assert answer.code == 2
    assert "--model" in answer.err


@pytest.mark.parametrize("command", ["coordinator", "worker", "learner", "grader"])
async def test_command_becomes_the_role(tmp_path: Path, config_path: Path, command: str) -> None:
    """The role itself then finds that there is no Redis, and gives up with its own exit code."""
    answer = await ringasync(
        *(command, str(config_path), "--redis-url", "redis://127.0.0.1:1/0", "--model", "m"),
        *("--set", "redis.retry_budget_s=0.2"),
        cwd=tmp_path,
    )
    assert answer.code == 3, answer.err
    assert "BrokerUnreachableError" in answer.err
    assert "127.0.0.1:1" in answer.err


async def test_redis_alone_until_ctrl_c(tmp_path: Path, config_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "ringasync", "redis", str(config_path)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env=environment,
    )
    assert process.stdout is not None
    async with asyncio.timeout(60):
        line = b""
        while b"Redis of run small" not in line:
            line = await process.stdout.readline()
            assert line, "ended before it said its address"
        url = line.decode().split(": ")[1].split()[0]
        broker = await Broker.connect(url, "small")
        assert await broker.create_run("{}", "hash")
        await broker.close()
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 0
        await process.communicate()
    assert "redis.url" not in os.listdir(tmp_path / "runs" / "small" / "redis")


@pytest.mark.parametrize("command", ["top", "samples", "audit", "pause", "resume"])
async def test_tool_without_any_run_says_so(tmp_path: Path, command: str) -> None:
    answer = await ringasync(command, cwd=tmp_path)
    assert answer.code == 2
    assert "no run in runs/" in answer.err


async def test_tool_on_an_unknown_run_names_the_known(tmp_path: Path, live_run: Path) -> None:
    answer = await ringasync("audit", "--run", "smal", cwd=tmp_path)
    assert answer.code == 2
    assert "no run 'smal'" in answer.err
    assert "small" in answer.err


async def test_tool_fails_fast_when_redis_is_not_there(tmp_path: Path) -> None:
    answer = await asyncio.wait_for(
        ringasync("audit", "--run", "x", "--redis-url", "redis://127.0.0.1:1/0", cwd=tmp_path), 30
    )
    assert answer.code == 3
    assert "127.0.0.1:1" in answer.err
    assert "did not answer" in answer.err


async def test_tool_on_a_broker_without_that_run(tmp_path: Path, live_run: Path) -> None:
    url = (live_run / "redis" / "redis.url").read_text().strip()
    answer = await ringasync("audit", "--run", "other", "--redis-url", url, cwd=tmp_path)
    assert answer.code == 1
    assert "run 'other' does not exist" in answer.err


async def test_pause_and_resume(tmp_path: Path, live_run: Path) -> None:
    url = (live_run / "redis" / "redis.url").read_text().strip()
    broker = await Broker.connect(url, "small")
    answer = await ringasync("pause", "--run", "small", "--why", "lunch", cwd=tmp_path)
    assert answer.code == 0
    assert (await broker.run_meta())["paused"] == "1"
    assert (await broker.run_meta())["paused_why"] == "lunch"
    # by the file, and without naming the run at all
    assert (await ringasync("resume", "-r", "small.toml", cwd=tmp_path)).code == 0
    assert (await broker.run_meta())["paused"] == "0"
    assert (await ringasync("pause", cwd=tmp_path)).code == 0
    assert (await broker.run_meta())["paused"] == "1"
    await broker.close()


async def test_audit_of_a_balanced_run_also_when_it_is_over(tmp_path: Path, live_run: Path) -> None:
    answer = await ringasync("audit", cwd=tmp_path)
    assert answer.code == 0
    assert "balanced" in answer.out
    server = EmbeddedRedis(live_run / "redis")
    await server.start()
    await server.stop()
    answer = await ringasync("audit", cwd=tmp_path)
    assert answer.code == 0
    assert not (live_run / "redis" / "redis.url").exists()


async def test_audit_shows_what_went_wrong_in_redis_and_in_the_file(
    tmp_path: Path, live_run: Path
) -> None:
    url = (live_run / "redis" / "redis.url").read_text().strip()
    broker = await Broker.connect(url, "small")
    fence = await broker.acquire_lock("coordinator", "test", 60_000)
    rows = [
        NewGroup(f"g{i}", "train", "sums", "p", (1,), {}, i, 2, 8, f"row {i} is broken")
        for i in (1, 2)
    ]
    await broker.feed(fence, "f", rows, "c")
    await broker.close()
    old = {"kind": "outcome", "end": "grade_error", "lengths": [5, 6], "reason": "no verdict"}
    lines = [
        {**old, "group": "efirst-0001", "group_kind": "eval", "at_ms": 1},
        {**old, "group": "g1", "group_kind": "train", "at_ms": 2},  # newer in Redis
    ]
    (live_run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    answer = await ringasync("audit", cwd=tmp_path)
    assert answer.code == 0
    assert "2 groups ended quarantined (0 tokens)" in answer.out
    assert "g2: row 2 is broken" in answer.out
    assert "1 groups ended grade_error (11 tokens)" in answer.out
    assert "efirst-0001: no verdict" in answer.out


async def test_report_of_a_run_that_has_hardly_begun(tmp_path: Path, live_run: Path) -> None:
    answer = await ringasync("report", cwd=tmp_path)
    assert answer.code == 0
    assert "report.html" in answer.out
    assert "report.html" in os.listdir(live_run)
    unknown = await ringasync("report", "nothing", cwd=tmp_path)
    assert unknown.code == 2
    assert "no run 'nothing' in runs/ (there: small)" in unknown.err


async def test_rollout_that_is_not_known(tmp_path: Path, live_run: Path) -> None:
    answer = await ringasync("inspect", "g000001.0", cwd=tmp_path)
    assert answer.code == 1
    assert "nothing is known of g000001.0" in answer.out
    assert (await ringasync("samples", "-n", "3", cwd=tmp_path)).code == 0


async def test_pause_of_a_run_that_is_over(tmp_path: Path, live_run: Path) -> None:
    server = EmbeddedRedis(live_run / "redis")
    await server.start()
    await server.stop()
    answer = await ringasync("pause", cwd=tmp_path)
    assert answer.code == 2
    assert "is not up" in answer.err


async def test_rm_asks_first(tmp_path: Path, live_run: Path) -> None:
    kept = await ringasync("rm", "small", cwd=tmp_path, stdin="n\n")
    assert kept.code == 1
    assert (live_run / "run.json").exists()
    gone = await ringasync("rm", "small", cwd=tmp_path, stdin="y\n")
    assert gone.code == 0
    assert live_run.name not in os.listdir(live_run.parent)


async def test_rm_deletes_only_the_keys_of_its_run(tmp_path: Path, live_run: Path) -> None:
    url = (live_run / "redis" / "redis.url").read_text().strip()
    other = await Broker.connect(url, "other")
    await other.create_run("{}", "hash")
    small = await Broker.connect(url, "small")
    answer = await ringasync("rm", "small", "--redis-url", url, "--yes", cwd=tmp_path)
    assert answer.code == 0, answer.err
    assert (await other.run_meta())["config_hash"] == "hash"
    await small.create_run("{}", "new")  # would be refused if the old one were still there
    await other.close()
    await small.close()


async def test_rm_is_refused_while_the_run_is_worked_on(tmp_path: Path, live_run: Path) -> None:
    from ringasync.runtime.runfiles import claim

    with claim(live_run):
        answer = await ringasync("rm", "small", "--yes", cwd=tmp_path)
    assert answer.code == 4
    assert f"process {os.getpid()}" in answer.err
    assert (live_run / "run.json").exists()
