"""How roles are started, and what they make of their command line."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from ringasync.config.load import load_config
from ringasync.errors import ConfigError
from ringasync.runtime.role import (
    REDIS_URL_VARIABLE,
    parse_role,
    resolve_redis_url,
    role_parser,
)
from ringasync.runtime.roles import Place, role_command, role_specs
from ringasync.runtime.shutdown import PARENT_PID_VARIABLE

TEXT = """
[run]
name = "demo"
dir = "{runs}"
[[data.tasks]]
name = "sums"
kind = "mathematics"
"""
PLACE = Place(Path("demo.toml"), ("run.seed=1",), "redis://127.0.0.1:7/0", "cache/model")


@pytest.fixture
def config_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(REDIS_URL_VARIABLE, raising=False)
    path = tmp_path / "demo.toml"
    path.write_text(TEXT.format(runs=tmp_path / "runs"), encoding="utf-8")
    return path


def test_local_run_has_every_role(config_path: Path) -> None:
    config = load_config(config_path, ["worker.count=2", "learner.threads=2"])
    specs = {spec.name: spec for spec in role_specs(config, PLACE)}
    assert list(specs) == ["coordinator", "learner", "worker-1", "worker-2"]
    assert [spec.name for spec in specs.values() if spec.essential] == ["coordinator", "learner"]
    assert specs["learner"].environment["OMP_NUM_THREADS"] == "2"
    assert specs["worker-1"].environment["OMP_NUM_THREADS"] == "1"
    assert specs["worker-1"].environment[PARENT_PID_VARIABLE] == str(os.getpid())
    assert specs["worker-1"].drain_timeout_s == config.worker.drain_timeout_s


def test_grader_of_its_own_when_asked(config_path: Path) -> None:
    config = load_config(config_path, ["grader.in_worker=false"])
    assert "grader" in [spec.name for spec in role_specs(config, PLACE)]


def test_role_reads_back_what_the_supervisor_passes(config_path: Path) -> None:
    place = Place(config_path, ("run.seed=5",), "redis://127.0.0.1:7/0", "cache/model")
    command = role_command("learner", place)
    assert command[:3] == (sys.executable, "-m", "learner")
    arguments = parse_role("learner", "trains", command[3:])
    assert arguments.config.run.seed == 5
    assert (arguments.redis_url, arguments.model) == ("redis://127.0.0.1:7/0", "cache/model")


def test_wrong_configuration_is_one_line_and_exit_2(
    config_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_role("learner", "trains", [str(config_path), "--set", "learner.lr=x"])
    assert caught.value.code == 2
    assert "learner.lr" in capsys.readouterr().err


def test_starter_has_to_be_named_by_then(
    config_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_role("learner", "trains", [str(config_path), "--redis-url", "redis://h:1"])
    assert "--model" in capsys.readouterr().err


def test_broker_address_order(config_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(config_path)
    with pytest.raises(ConfigError, match="run 'demo' is not up"):
        resolve_redis_url(config)
    (config.run_dir / "redis").mkdir(parents=True)
    (config.run_dir / "redis" / "redis.url").write_text("redis://127.0.0.1:1/0\n")
    assert resolve_redis_url(config) == "redis://127.0.0.1:1/0"
    monkeypatch.setenv(REDIS_URL_VARIABLE, "redis://127.0.0.1:2/0")
    assert resolve_redis_url(config) == "redis://127.0.0.1:2/0"
    assert resolve_redis_url(config, "redis://127.0.0.1:3/0") == "redis://127.0.0.1:3/0"


def test_parser_shows_how_to_override() -> None:
    assert "--set loss.mismatch=tis" in role_parser("workers", "generates").format_help()
