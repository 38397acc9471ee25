"""Run schedules, search them for a failing one, and say how to run it again."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded_with

from tests.broker.kit import altered_scripts
from tests.draws import same_draws

from .after import check
from .schedule import Schedule, schedules
from .wire import Step, no_chance
from .world import Simulation

TAIL_STEPS = 40


class FailedError(AssertionError):
    """A schedule after which something did not hold: what, when, and how to see it again."""

    def __init__(self, schedule: Schedule, cause: BaseException, steps: list[Step]) -> None:
        self.schedule, self.cause = schedule, cause
        shown = [str(step)[:200] for step in steps[-TAIL_STEPS:]]
        super().__init__(
            "\n".join(
                [
                    f"{type(cause).__name__}: {cause}",
                    *schedule.lines(),
                    f"the last of {len(steps)} steps:",
                    *shown,
                    f"again: python -m tests.simulation --replay '{schedule.to_json()}'",
                ]
            )
        )


@contextmanager
def simulated_scripts() -> Iterator[None]:
    """The broker sends scripts without chance; one that is altered already stays so."""
    with altered_scripts(no_chance):
        yield


def run_once(server: redis.Redis, schedule: Schedule) -> list[str]:
    """One run to its end with all checks; its steps as lines. Raises ``FailedError``."""
    server.flushall()
    memory = Path("/dev/shm")  # noqa: S108 - a disk's fsync is no part of what is looked at
    folder = Path(tempfile.mkdtemp(prefix="simulation-", dir=memory if memory.is_dir() else None))
    simulation = Simulation(server, schedule, folder)
    try:
        simulation.run()
        check(simulation)
    except Exception as error:
        raise FailedError(schedule, error, simulation.wire.steps) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return [str(step).replace(str(folder), "") for step in simulation.wire.steps]


def search(
    server: redis.Redis, count: int, seed: int, *, shrink: bool = True, rollbacks: bool = False
) -> None:
    """Run ``count`` schedules drawn from ``seed``. Raises ``FailedError``, shrunk if wanted.

    The same seed draws the same schedules under the same version of hypothesis.
    """
    phases = [Phase.generate, *([Phase.shrink] if shrink else [])]

    @seeded_with(seed)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(schedules(rollbacks=rollbacks))
    def every_schedule(schedule: Schedule) -> None:
        run_once(server, schedule)

    with simulated_scripts(), same_draws():
        every_schedule()
