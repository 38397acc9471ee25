"""``make compose-test``: the compose file as it is, in real containers; figures at the end.

Not collected by pytest: it needs a container engine and minutes. The engine is ``$COMPOSE``, else
``docker compose``, else ``podman-compose``. A second compose file adds the folder of the
configuration, which is the demo's with fewer steps (``--full``: the demo as shipped).

Cold start to the first trained step; ``kill worker`` and a restart; ``--scale worker=4``; at the
end a balanced ledger and the report on the volume.
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

ROOT = Path(__file__).parents[2]
CONFIG_DIR = "/app/test-configs"
SMALLER = {"starter": {"steps": 150}, "learner": {"steps": 16}, "eval": {"prompts": 64}}
ROLES = ("coordinator", "worker", "grader", "learner")
PROJECT = "ringasync-test"
WAIT_S = 900.0


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
        self._env = {
            **os.environ,
            "REDIS_PASSWORD": "compose-test",
            "RINGASYNC_CONFIG": self.config,
        }

    def __call__(self, *arguments: str, check: bool = True) -> str:
        """Run a compose command; its stdout. A failure shows all it said."""
        done = subprocess.run(
            [*self._command, *arguments], capture_output=True, text=True, env=self._env, cwd=ROOT
        )
        if check and done.returncode:
            raise SystemExit(f"compose {shlex.join(arguments)}: {done.stdout}\n{done.stderr}")
        return done.stdout

    def redis(self, *command: str) -> str:
        """One answer of the run's Redis, empty while it does not answer."""
        line = f'REDISCLI_AUTH="$REDIS_PASSWORD" redis-cli {shlex.join(command)}'
        return self("exec", "-T", "redis", "sh", "-c", line, check=False).strip()

    def step(self) -> int:
        """Steps that the learner has trained."""
        answer = self.redis("HGET", "ring:{demo}:meta", "learner_step")
        return int(answer) if answer.isdecimal() else 0

    def phase(self) -> str:
        return self.redis("HGET", "ring:{demo}:meta", "phase")

    def wait(self, what: str, condition: Callable[[], bool]) -> float:
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

    def workers(self) -> int:
        """Living worker sessions."""
        ids = self.redis("ZRANGE", "ring:{demo}:sessions", "0", "-1").split()
        roles = [self.redis("HGET", f"ring:{{demo}}:session:{one}", "role") for one in ids]
        return roles.count("worker")

    def healthy(self, role: str) -> bool:
        """Whether the role's health check passes, run in its container as the engine would."""
        return "heartbeat" in self("exec", "-T", role, "ringasync", "health", role, check=False)


def whole_run(stack: Stack) -> dict[str, Any]:
    """The test; returns its figures."""
    figures: dict[str, Any] = {}
    began = time.monotonic()
    stack("up", "-d")
    print(f"up -d returned after {time.monotonic() - began:.1f} s", flush=True)
    stack.wait("first trained step, from then", lambda: stack.step() >= 1)
    figures["cold_start_to_first_step_s"] = round(time.monotonic() - began, 1)
    for role in ROLES:
        assert stack.healthy(role), f"health check of {role} fails in a running service"
    assert not stack.redis("CONFIG", "GET", "appendonly").endswith("no")

    step = stack.step()
    stack("kill", "worker")
    stack.wait("session of the killed worker gone", lambda: stack.workers() == 0)
    audit(stack, "exec", "-T", "coordinator", "ringasync")
    stack("start", "worker")
    figures["restart_to_joined_s"] = round(
        stack.wait("worker back", lambda: stack.workers() > 0), 1
    )
    stack.wait("a step after the kill", lambda: stack.step() > step)

    began = time.monotonic()
    stack("up", "-d", "--no-recreate", "--scale", "worker=4")
    stack.wait("four workers", lambda: stack.workers() == 4)
    figures["scale_1_to_4_s"] = round(time.monotonic() - began, 1)
    figures["step_when_scaled"] = stack.step()

    stack.wait("run done", lambda: stack.phase() == "done")
    figures["steps"] = stack.step()
    stack.wait("coordinator gone", lambda: not stack.healthy("coordinator"))
    audit(stack, "run", "--rm", "--no-deps", "-T", "coordinator")
    listed = stack(
        *("run", "--rm", "--no-deps", "-T", "--entrypoint", "ls", "coordinator"),
        *("-l", "/app/runs/demo"),
    )
    for name in ("report.html", "summary.json"):
        assert name in listed, listed
    return figures


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
