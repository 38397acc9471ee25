"""A learner on two ranks as its own processes, on one or two "nodes", for tests that watch it live
and die."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from .kit import Feeder, LearnerProcess, check_ledger, config_path, until, write_config

CANCELLED = 1e-6
"""How far apart two losses may be that are near zero: sums of parts of about one that cancel."""
PROMPT_S = 12.0
"""From the death of one process to the end of the last: seconds, on a loaded machine."""


class RankedLearner:
    """``python -m learner`` on two ranks, with its launcher; as ``node`` of two on one of them."""

    def __init__(
        self, config: Path, url: str, *extra: str, node: int | None = None, port: int = 0
    ) -> None:
        self.log_path = config.with_suffix(".log" if node is None else f".node-{node}.log")
        self.wanted = 2 if node is None else 1
        place = {
            "PET_NNODES": "2",
            "PET_NODE_RANK": str(node),
            "PET_RDZV_ENDPOINT": f"127.0.0.1:{port}",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "learner", str(config), "--redis-url", url),
                    *("--set", "learner.ranks=2", *extra),
                ],
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
                | {"CUDA_VISIBLE_DEVICES": ""}
                | ({} if node is None else place),
                start_new_session=True,
            )
        self.launcher = psutil.Process(self.process.pid)
        self.ranks: list[psutil.Process] = []

    def find_ranks(self) -> bool:
        """Whether all its ranks have begun; keeps them in order."""
        found = {}
        for child in self.launcher.children():
            try:
                found[child.environ().get("RANK", "")] = child
            except psutil.Error:
                return False
        found.pop("", None)
        self.ranks = [found[key] for key in sorted(found)]
        return len(self.ranks) == self.wanted

    def log(self) -> str:
        """What all of them wrote."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")[-8000:]

    async def ended(self) -> int:
        """The launcher's exit code, once no process is left; fails where that takes long."""
        began_s = time.monotonic()

        async def gone() -> bool:
            return self.process.poll() is not None and not any(
                one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in self.ranks
            )

        await until(gone, f"the end of all processes:\n{self.log()}", PROMPT_S)
        assert time.monotonic() - began_s < PROMPT_S
        return int(self.process.returncode)

    def kill(self) -> None:
        """Leave nothing behind."""
        for one in (*self.ranks, self.launcher):
            try:
                one.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()


async def begin_training(
    feeder: Feeder, url: str, started: list[RankedLearner], step: int, *extra: str
) -> RankedLearner:
    """A learner of two ranks that has trained ``step`` batches; ``started`` gets it too."""
    learner = RankedLearner(config_path(feeder), url, *extra)
    started.append(learner)
    await trained(feeder, [learner], step)
    return learner


async def trained(feeder: Feeder, learners: list[RankedLearner], step: int) -> None:
    """Wait until these learners, of one job, have trained ``step`` batches."""

    async def begun() -> bool:
        for one in learners:
            assert one.process.poll() is None, one.log()
        return all([one.find_ranks() for one in learners])

    await until(begun, "both ranks", 120)

    async def done() -> bool:
        return await begun() and await feeder.step() >= step

    await until(done, f"step {step}", 150)


async def finished_alone(
    feeder: Feeder, url: str, expected: dict[int, float]
) -> list[dict[str, Any]]:
    """Have one torch process train the rest: each step has its ``expected`` loss, and the tokens of
    five batches are trained once. Returns the run's step lines."""
    alone = LearnerProcess.start(config_path(feeder), url)
    assert await alone.wait() == 0, alone.log()
    rows = await feeder.metrics()
    assert {row["step"] for row in rows} == expected.keys()
    for row in rows:
        assert row["loss"] == pytest.approx(expected[row["step"]], rel=1e-5, abs=CANCELLED)
    await check_ledger(feeder, 5 * 120)
    return rows


async def losses_alone(url: str, folder: Path, model: Path, prompts: int) -> dict[int, float]:
    """Loss by step of one torch process that nobody stops, in a run of its own."""
    reference = await Feeder.make(url, write_config(folder, "alone", model))
    await reference.feed(prompts)
    alone = LearnerProcess.start(config_path(reference), url)
    assert await alone.wait() == 0, alone.log()
    losses = {row["step"]: row["loss"] for row in await reference.metrics()}
    await reference.close()
    return losses
