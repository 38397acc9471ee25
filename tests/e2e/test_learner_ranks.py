"""A whole run whose learner has two ranks, one of which is killed, then the launcher of both."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

import pytest

from .test_whole_run import check_finished, has_done
from .tiny_run import TinyRun, started, tiny_settings

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


def has_both_ranks(run: TinyRun) -> bool:
    """Whether launcher and both ranks run."""
    return len(run.role_pids("learner")) == 3


def test_ranks_and_their_launcher_are_killed_and_the_run_goes_on(
    tmp_path: Path, tiny_model: Path
) -> None:
    settings = tiny_settings(tmp_path, tiny_model, learner__ranks=2, learner__steps=12)
    with started(tmp_path, settings) as run:
        for at_least, index in ((1, -1), (3, 0)):  # a rank, then the launcher
            run.wait_until(partial(has_done, run, at_least), f"step {at_least}", 200)
            run.wait_until(partial(has_both_ranks, run), "launcher and ranks", 200)
            os.kill(run.role_pids("learner")[index], signal.SIGKILL)
        assert run.wait(200) == 0, run.tail()
        check_finished(run, 12)
        said = (run.run_dir / "logs" / "learner.log").read_text()
        assert "ended: killed by SIGKILL; it went first, and the job with it" in said
        assert run.log.read_text().count("learner (pid") == 2  # each death, one restart
