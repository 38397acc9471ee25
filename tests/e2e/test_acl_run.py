"""A whole run over TLS, each role with its own Redis user and no more rights than it needs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import psutil
import pytest
from redis import Redis

from ringasync.broker import access
from tests.conftest import RedisServer
from tests.e2e.tiny_run import TinyRun, ringasync, started, tiny_settings, write_config
from tests.redis_process import redis_process
from tests.tls_kit import Authority, tls_front

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

PASSWORDS = {name: f"password-of-the-{name}" for name in (*access.ROLES, "admin")}
SECRETS = {f"RINGASYNC_REDIS_PASSWORD_{n.upper()}": word for n, word in PASSWORDS.items()}


def refusals(admin: Redis) -> list[str]:
    """What Redis refused to our users; redis-py's introduction of itself is not needed."""
    return [
        f"{entry['username']}: {entry['object']} ({entry['reason']}, {entry['context']})"
        for entry in admin.acl_log()
        if not str(entry["object"]).startswith("client")
    ]


def roles_see_only_their_own_secret(run: TinyRun) -> bool:
    """Checked in the processes themselves, as the kernel shows them."""
    pids = {role: run.role_pids(role) for role in ("coordinator", "worker", "learner")}
    if not all(pids.values()):
        return False
    for role, found in pids.items():
        environment = psutil.Process(found[0]).environ()
        seen = {word for word in PASSWORDS.values() if word in environment.values()}
        assert seen == {PASSWORDS[role]}
        assert environment["RINGASYNC_REDIS_USERNAME"] == f"ring-{role}"
        command = " ".join(psutil.Process(found[0]).cmdline())
        assert not [word for word in PASSWORDS.values() if word in command]
    return True


def tool(run: TinyRun, *arguments: str, **env: str) -> str:
    done = subprocess.run(
        ringasync(*arguments), env={**run.env, **env}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_role_does_all_its_work_under_its_own_user(
    tiny_model: Path, tmp_path: Path, any_redis: RedisServer
) -> None:
    users = tmp_path / "users.acl"
    users.write_text(access.users(int(any_redis.version.split(".")[0]), PASSWORDS, "tiny"))
    authority = Authority.make(tmp_path / "ca")
    cert, key = authority.client_files()
    context = authority.server_context("127.0.0.1", asks_client=True)
    with (
        redis_process(any_redis.binary, tmp_path, "--aclfile", str(users)) as port,
        tls_front(port, context) as tls_port,
    ):
        settings = tiny_settings(
            tmp_path,
            tiny_model,
            redis__url=f"rediss://127.0.0.1:{tls_port}/0",
            redis__tls_ca_file=str(authority.ca_file),
            redis__tls_cert_file=str(cert),
            redis__tls_key_file=str(key),
            weights__transport="redis",
            grader__in_worker=False,
            learner__steps=3,
            eval__prompts=8,
        )
        admin = Redis(port=port, password=PASSWORDS["admin"])
        with started(tmp_path, settings, **SECRETS) as run:
            run.wait_until(lambda: roles_see_only_their_own_secret(run), "all roles up")
            where = ("--run", str(run.run_dir))
            run.wait_until(lambda: admin.xlen("ring:{tiny}:metrics") > 0, "metrics")
            tool(run, "health", "worker", *where, **role_only("worker"))
            code = run.wait(150)
            assert code == 0, run.tail()
            assert run.summary()["ledger_balanced"] is True
            assert run.summary()["steps"] == 3
            tool(run, "audit", *where)
            tool(run, "samples", *where)
            logs = run.log.read_text() + run.tail() + (run.run_dir / "run.json").read_text()
            tool(run, "rm", "--yes", str(run.run_dir))
        assert admin.keys("*") == []
        assert refusals(admin) == []
        assert not [word for word in PASSWORDS.values() if word in logs]
        admin.close()


def role_only(role: str) -> dict[str, str]:
    """Secrets of a container that runs one role."""
    own = {"RINGASYNC_REDIS_USERNAME": f"ring-{role}", "RINGASYNC_REDIS_PASSWORD": PASSWORDS[role]}
    return dict.fromkeys(SECRETS, "") | own


def test_a_run_under_too_few_rights_says_what_is_missing(
    tiny_model: Path, tmp_path: Path, any_redis: RedisServer
) -> None:
    """The learner as a worker: it ends at once, and names user and remedy."""
    users = tmp_path / "users.acl"
    users.write_text(access.users(int(any_redis.version.split(".")[0]), PASSWORDS))
    with redis_process(any_redis.binary, tmp_path, "--aclfile", str(users)) as port:
        settings = tiny_settings(tmp_path, tiny_model, redis__url=f"redis://127.0.0.1:{port}/0")
        config = write_config(tmp_path, settings)
        environment = {**os.environ, **SECRETS, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(
            ringasync("coordinator", config),
            env=environment | role_only("worker"),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 3
        assert "ACL user" in done.stdout + done.stderr
