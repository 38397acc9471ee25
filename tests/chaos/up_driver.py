"""``ringasync up`` for a chaos run: ``python up_driver.py CONFIG PLAN.json``.

The supervisor is the product's, with patience for any number of restarts. Every role reaches Redis
through a port of its own and may have a clock of its own; roles come as often as the plan says.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ringasync.cli.running import run_in_loop
from ringasync.config.schema import Config
from ringasync.runtime.process import RoleSpec
from ringasync.runtime.roles import Place, role_specs
from ringasync.runtime.shutdown import Shutdown
from ringasync.runtime.supervisor import RestartPolicy
from ringasync.runtime.up import Up, UpOptions

POLICY = RestartPolicy(max_restarts=1_000_000, backoff_s=0.2, backoff_max_s=0.2)


def planned_specs(config: Config, place: Place, plan: dict[str, Any]) -> list[RoleSpec]:
    """The product's own specs, multiplied: ``coordinator`` becomes ``coordinator-1`` and so on."""
    found = {spec.name: spec for spec in role_specs(config, place)}
    specs = []
    for name, port in plan["ports"].items():
        spec = found.get(name) or found[name.rpartition("-")[0]]
        command = [f"redis://127.0.0.1:{port}/0" if c == place.redis_url else c
                   for c in spec.command]  # fmt: skip
        environment = {**spec.environment, **plan["clocks"].get(name, {"LD_PRELOAD": ""})}
        specs.append(replace(spec, name=name, command=tuple(command), environment=environment))
    return specs


def main() -> int:
    """The supervisor's exit code."""
    plan: dict[str, Any] = json.loads(Path(sys.argv[2]).read_text())

    async def body() -> int:
        shutdown = Shutdown(lambda: command.kill_at_once())
        command = Up(
            UpOptions(Path(sys.argv[1])),
            shutdown,
            make_specs=lambda config, place: planned_specs(config, place, plan),
            policy=POLICY,
        )
        shutdown.install()
        return await command.run()

    return run_in_loop(body)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    raise SystemExit(main())
