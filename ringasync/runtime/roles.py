"""How each role's process is started: the one place that knows their module names."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ringasync.config.schema import Config
from ringasync.runtime.process import RoleSpec, thread_environment
from ringasync.runtime.shutdown import PARENT_PID_VARIABLE

ROLE_MODULES = {
    "coordinator": ("ringasync.coordinator",),
    "worker": ("workers",),
    "grader": ("workers.grader",),
    "learner": ("learner",),
}
"""Arguments after ``python -m``. Names only: ringasync imports neither workers nor learner."""

STARTER_MODULE = "learner.starter"

LEARNER_DRAIN_TIMEOUT_S = 60.0
"""A step and a checkpoint may be under way; both end within this on any model a laptop trains."""


@dataclass(frozen=True, slots=True)
class Place:
    """What every role is told: where the configuration, the broker and the model are."""

    config_path: Path
    overrides: tuple[str, ...]
    redis_url: str
    model: str

    def arguments(self) -> list[str]:
        """The command line after the module's name."""
        return [
            str(self.config_path),
            *override_arguments(self.overrides),
            "--redis-url",
            self.redis_url,
            "--model",
            self.model,
        ]


def override_arguments(overrides: Sequence[str]) -> list[str]:
    """``--set a=1 --set b=2``."""
    return [part for override in overrides for part in ("--set", override)]


def role_command(role: str, place: Place) -> tuple[str, ...]:
    """The whole command that runs ``role``; the interpreter is this one."""
    return (sys.executable, "-m", *ROLE_MODULES[role], *place.arguments())


def role_specs(config: Config, place: Place) -> list[RoleSpec]:
    """All roles of a local run, as ``ringasync up`` starts them."""
    return list(_role_specs(config, place))


def _role_specs(config: Config, place: Place) -> Iterator[RoleSpec]:
    def spec(name: str, role: str, threads: int, timeout_s: float, essential: bool) -> RoleSpec:
        environment = thread_environment(threads) | {PARENT_PID_VARIABLE: str(os.getpid())}
        return RoleSpec(name, role_command(role, place), essential, timeout_s, environment)

    drain_s = config.worker.drain_timeout_s
    yield spec("coordinator", "coordinator", 1, drain_s, True)
    yield spec("learner", "learner", config.learner.threads, LEARNER_DRAIN_TIMEOUT_S, True)
    for number in range(1, config.worker.count + 1):
        yield spec(f"worker-{number}", "worker", config.worker.threads, drain_s, False)
    if not config.grader.in_worker:
        yield spec("grader", "grader", 1, drain_s, False)
