"""Who logs in as whom: secrets come from the environment, each role gets its own."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ringasync.broker import access
from ringasync.cli.main import app
from ringasync.runtime.credentials import (
    ACL_ROLES,
    keep_out_of_sight,
    password_variable,
    redis_credentials,
    role_environment,
)

PASSWORDS = {name: f"password-of-the-{name}" for name in ACL_ROLES}
ENVIRONMENT = {password_variable(name): word for name, word in PASSWORDS.items()}


def test_a_role_gets_its_own_secret_and_blanks_for_the_others() -> None:
    given = ENVIRONMENT | role_environment("worker", ENVIRONMENT)
    assert redis_credentials(given) == ("ring-worker", PASSWORDS["worker"])
    assert [word for word in given.values() if word in PASSWORDS.values()] == [PASSWORDS["worker"]]


def test_a_role_without_a_password_of_its_own_keeps_the_common_one() -> None:
    common = {"RINGASYNC_REDIS_PASSWORD": "common", password_variable("operator"): "op"}
    given = common | role_environment("worker", common)
    assert redis_credentials(given) == (None, "common")
    assert redis_credentials(common) == ("ring-operator", "op")
    assert redis_credentials({}) == (None, None)


def test_a_password_in_an_address_moves_into_the_environment() -> None:
    environment: dict[str, str] = {}
    url = keep_out_of_sight("redis://me:p%40ss@db:6379/0", environment)
    assert url == "redis://me@db:6379/0"
    assert redis_credentials(environment) == ("me", "p@ss")
    assert keep_out_of_sight("redis://db:6379/0", environment) == "redis://db:6379/0"


def test_acl_writes_hashes_into_a_file_of_our_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, word in ENVIRONMENT.items():
        monkeypatch.setenv(name, "" if "GRADER" in name else word)
    path = tmp_path / "users.acl"
    done = CliRunner().invoke(app, ["acl", "--redis", "6", "--run", "demo", "--output", str(path)])
    assert done.exit_code == 0, done.output
    assert "no password: ring-grader" in done.output
    passwords = {name: word for name, word in PASSWORDS.items() if name != "grader"}
    assert path.read_text() == access.users(6, passwords, "demo")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not [word for word in PASSWORDS.values() if word in path.read_text() + done.output]
    printed = CliRunner().invoke(app, ["acl", "--redis", "6", "--run", "demo"])
    assert printed.output == path.read_text()
