"""``make compose-test``: the compose file as it is, in real containers; figures at the end.

Not collected by pytest: it needs a container engine and minutes. The engine is ``$COMPOSE``, else
``docker compose``, else ``podman-compose``. A second compose file adds the folder of the
configuration, which is the demo's with another number of steps. ``--full``: the demo as shipped,
which is left alone.

Refused without the password; cold start to the first trained step; every service's health check,
run as the engine would (podman-compose starts nothing by them); ``kill worker`` while it generates
and a restart; ``--scale worker=4``; ``kill learner`` and a restart from its checkpoint; at the end
a balanced ledger without lost tokens and the report on the volume.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w
import yaml

ROOT = Path(__file__).parents[2]
CONFIG_DIR = "/app/test-configs"
SMALLER = {
    "starter": {"steps": 150},
    "learner": {"steps": 40, "checkpoint_every_steps": 5},
    "eval": {"prompts": 64},
}
ROLES = ("coordinator", "worker", "grader", "learner")
SERVICES = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
PROJECT = "ringasync-test"
KEY = "ring:{demo}:"
SANDBOX = (
    "from ringasync.rewards.isolation import find_sandbox as f; s = f(); "
    "print('none: ' + s if isinstance(s, str) else 'works')"
)
WAIT_S = 1800.0


def compose_program() -> list[str]:
    """The engine's compose command."""
    if named := os.environ.get("COMPOSE"):
        return shlex.split(named)
    return ["docker", "compose"] if shutil.which("docker") else ["podman-compose"]


class Stack:
    """The project's containers."""

    def __init__(self, folder: Path, full: bool) -> None:
        demo = tomllib.loads((ROOT / "configs/demo.toml").read_text(encoding="utf-8"))
        for section, values in {} if full else SMALLER.items():
            demo[section] |= values
        configs = folder / "configs"
        configs.mkdir()
        (configs / "demo.toml").write_text(tomli_w.dumps(demo), encoding="utf-8")
        folder.chmod(0o755)
        mounts = {"volumes": [f"{configs}:{CONFIG_DIR}:ro"]}
        extra = folder / "test.yml"
        extra.write_text(json.dumps({"services": dict.fromkeys(ROLES, mounts)}), encoding="utf-8")
        files = ("-f", str(ROOT / "docker-compose.yml"), "-f", str(extra))
        self._command = [*compose_program(), "-p", PROJECT, *files]
        self.config = f"{CONFIG_DIR}/demo.toml"
        self.is_full = full
        self._env = {
            **os.environ,
            "REDIS_PASSWORD": "compose-test",
            "RINGASYNC_CONFIG": self.config,
        }

    def __call__(self, *arguments: str, check: bool = True) -> str:
        """Run a compose command; its stdout. A failure shows all it said."""
        done = self.run(*arguments)
        if check and done.returncode:
            raise SystemExit(f"compose {shlex.join(arguments)}: {done.stdout}\n{done.stderr}")
        return done.stdout

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a compose command, whatever comes of it; an empty variable is taken away."""
        given = {name: value for name, value in (self._env | environment).items() if value}
        return subprocess.run(
            [*self._command, *arguments], capture_output=True, text=True, env=given, cwd=ROOT
        )

    def redis(self, *command: str) -> str:
        """One answer of the run's Redis, empty while it does not answer."""
        line = f'REDISCLI_AUTH="$REDIS_PASSWORD" redis-cli {shlex.join(command)}'
        return self("exec", "-T", "redis", "sh", "-c", line, check=False).strip()

    def step(self) -> int:
        """Steps that the learner has trained."""
        answer = self.redis("HGET", f"{KEY}meta", "learner_step")
        return int(answer) if answer.isdecimal() else 0

    def phase(self) -> str:
        return self.redis("HGET", f"{KEY}meta", "phase")

    def wait(self, what: str, condition: Callable[[], object]) -> float:
        """Seconds until ``condition`` holds; the logs are shown when it does not."""
        began = time.monotonic()
        while not condition():
            if time.monotonic() - began > WAIT_S:
                self("logs", check=False)
                raise SystemExit(f"{what}: not within {WAIT_S:g} s; see the logs of {PROJECT}")
            time.sleep(0.5)
        took_s = time.monotonic() - began
        print(f"{what}: {took_s:.1f} s", flush=True)
        return took_s

    def workers(self) -> dict[str, int]:
        """Living worker sessions, with how many rollouts each holds."""
        ids = self.redis("ZRANGE", f"{KEY}sessions", "0", "-1").split()
        roles = {one: self.redis("HGET", f"{KEY}session:{one}", "role") for one in ids}
        return {
            one: int(self.redis("SCARD", f"{KEY}leases:{one}") or 0)
            for one, role in roles.items()
            if role == "worker"
        }

    def is_healthy(self, service: str) -> bool:
        """Whether the service's health check passes, run in its container as the engine would."""
        kind, *command = SERVICES[service]["healthcheck"]["test"]
        if kind == "CMD-SHELL":
            command = ["sh", "-c", command[0].replace("$$", "$")]
        return self.run("exec", "-T", service, *command).returncode == 0


def whole_run(stack: Stack) -> dict[str, Any]:
    """The test; returns its figures."""
    figures: dict[str, Any] = {}
    refused = stack.run("up", "-d", REDIS_PASSWORD="")
    assert refused.returncode, "came up without a password"
    assert "set REDIS_PASSWORD in the environment or in .env" in refused.stdout + refused.stderr, (
        refused
    )
    first = began = time.monotonic()
    stack("up", "-d")
    print(f"up -d returned after {time.monotonic() - began:.1f} s", flush=True)
    stack.wait("first trained step, from then", lambda: stack.step() >= 1)
    figures["cold_start_to_first_step_s"] = round(time.monotonic() - began, 1)
    for service in ("redis", *ROLES):
        assert stack.is_healthy(service), f"health check of {service} fails in a running service"
    assert stack.redis("CONFIG", "GET", "appendonly").endswith("yes")
    figures["sandbox"] = stack("exec", "-T", "grader", "python", "-c", SANDBOX).strip()

    if not stack.is_full:
        disturb(stack, figures)
    stack.wait("run done", lambda: stack.phase() == "done")
    figures["steps"] = stack.step()
    figures["cold_start_to_end_s"] = round(time.monotonic() - first, 1)
    stack.wait("coordinator gone", lambda: not stack.is_healthy("coordinator"))
    audit(stack, "run", "--rm", "--no-deps", "-T", "coordinator")
    assert stack.redis("HGET", f"{KEY}ledger", "lost") in ("", "0")
    # A learner that comes back reads its checkpoint, sees that all is done, and leaves with 0.
    again = SERVICES["learner"]["command"][2:]
    stack("run", "--rm", "--no-deps", "-T", "learner", "learner", stack.config, *again)
    listed = stack(
        *("run", "--rm", "--no-deps", "-T", "--entrypoint", "ls", "coordinator"),
        *("-l", "/app/runs/demo"),
    )
    for name in ("report.html", "summary.json"):
        assert name in listed, listed
    return figures


def disturb(stack: Stack, figures: dict[str, Any]) -> None:
    """Kill a worker, grow to four, kill the learner; the run goes on each time."""
    stack.wait("a worker with rollouts", lambda: any(stack.workers().values()))
    step, before = stack.step(), set(stack.workers())
    stack("kill", "worker")
    stack.wait("session of the killed worker gone", lambda: not before & set(stack.workers()))
    audit(stack, "exec", "-T", "coordinator", "ringasync")
    stack("start", "worker")
    figures["restart_to_joined_s"] = round(stack.wait("worker back", lambda: stack.workers()), 1)
    stack.wait("a step after the kill", lambda: stack.step() > step)

    began = time.monotonic()
    stack("up", "-d", "--no-recreate", "--scale", "worker=4")
    stack.wait("four workers", lambda: len(stack.workers()) == 4)
    figures["scale_1_to_4_s"] = round(time.monotonic() - began, 1)
    figures["step_when_scaled"] = stack.step()
    stack.wait("rollouts on all four", lambda: all(stack.workers().values()))

    stack("kill", "learner")
    step = stack.step()
    stack("start", "learner")
    stack.wait("a step of the new learner", lambda: stack.step() > step)
    assert stack.phase() == "running", f"too late for the test: {stack.phase()}"


def audit(stack: Stack, *how: str) -> None:
    """The ledger balances, else the command's exit code ends the test."""
    print(stack(*how, "audit", "--run", stack.config), flush=True)


def main() -> None:
    """Build, run, print the figures; containers and volumes are removed at the end."""
    with tempfile.TemporaryDirectory() as scratch:
        stack = Stack(Path(scratch), "--full" in sys.argv)
        stack("down", "-v", check=False)
        began = time.monotonic()
        stack("build", "coordinator")  # all roles have one image
        print(f"build: {time.monotonic() - began:.1f} s", flush=True)
        try:
            print(json.dumps(whole_run(stack), indent=2))
        except BaseException:
            print(stack("logs", check=False)[-20000:], file=sys.stderr)
            raise
        finally:
            stack("down", "-v", check=False)


if __name__ == "__main__":
    main()
