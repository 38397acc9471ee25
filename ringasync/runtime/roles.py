"""How each role's process is started: the one place that knows their module names."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ringasync.config.schema import Config
from ringasync.runtime.credentials import role_environment
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
EXPORT_MODULE = "learner.export"
REPLAY_MODULE = "learner.replay"

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


def gpu_environment(config: Config, number: int) -> dict[str, str]:
    """Which GPUs worker ``number`` (from 0) sees, by ``worker.gpus``; empty when that is."""
    gpus = config.worker.gpus
    if not gpus:
        return {}
    each = max(1, int(config.worker.engine_options.get("tensor_parallel_size", 1)))
    chosen = [gpus[(number * each + i) % len(gpus)] for i in range(each)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, chosen))}


def role_specs(config: Config, place: Place) -> list[RoleSpec]:
    """All roles of a local run, as ``ringasync up`` starts them."""
    return list(_role_specs(config, place))


def _role_specs(config: Config, place: Place) -> Iterator[RoleSpec]:
    def environment(role: str, threads: int) -> dict[str, str]:
        own = {PARENT_PID_VARIABLE: str(os.getpid())} | role_environment(role)
        return thread_environment(threads) | own

    drain_s = config.worker.drain_timeout_s
    command = role_command("coordinator", place)
    yield RoleSpec("coordinator", command, True, drain_s, environment("coordinator", 1))
    command, threads = role_command("learner", place), config.learner.threads
    yield RoleSpec(
        "learner", command, True, LEARNER_DRAIN_TIMEOUT_S, environment("learner", threads)
    )
    for number in range(1, config.worker.count + 1):
        name = f"worker-{number}"
        # A name that lasts over restarts, so that a person can follow one worker in `top`.
        command = (*role_command("worker", place), "--worker-id", name)
        places = environment("worker", config.worker.threads) | gpu_environment(config, number - 1)
        yield RoleSpec(name, command, False, drain_s, places)
    if not config.grader.in_worker:
        own = environment("grader", 1)
        yield RoleSpec("grader", role_command("grader", place), False, drain_s, own)
