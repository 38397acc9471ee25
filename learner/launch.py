"""Starts the ranks of one learner by torchrun's agent, and ends all of them when one is gone.

The launcher is the learner's process for ``ringasync up`` and for a shell: it hands SIGTERM and
SIGINT to rank 0 and ends with rank 0's exit code.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Set
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from learner.devices import settled, visible_gpus
from learner.rank_process import LAUNCHER_PID_VARIABLE
from ringasync.config.schema import LearnerConfig
from ringasync.errors import ConfigError
from ringasync.runtime.process import describe_exit
from ringasync.runtime.shutdown import watch_parent

GRACE_S = 2.0
"""How long the other ranks have to leave by themselves when one is gone."""

_POLL_S = 0.1
_HOST = "127.0.0.1"


class _Job:
    """The agent in a thread of its own, so that signals come to this one."""

    def __init__(self, ranks: int, argv: list[str]) -> None:
        self.failures: Mapping[int, ProcessFailure] = {}
        self.problem: BaseException | None = None
        self._config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            run_id=f"learner-{os.getpid()}",
            rdzv_backend="c10d",
            rdzv_endpoint=f"{_HOST}:0",
            local_addr=_HOST,
            max_restarts=0,  # `ringasync up` starts the whole learner anew, from its checkpoint
            monitor_interval=_POLL_S,
            logs_specs=DefaultLogsSpecs(),
        )
        self._argv = argv
        self.thread = threading.Thread(target=self._run, name="torchrun")

    def _run(self) -> None:
        try:
            elastic_launch(self._config, sys.executable)("-u", "-m", "learner", *self._argv)
        except ChildFailedError as error:
            self.failures = error.failures
        except BaseException as error:  # raised again in the main thread
            self.problem = error


def launch(learner: LearnerConfig, argv: list[str]) -> int:
    """Run ``python -m learner ARGV`` on ``learner.ranks`` ranks to the end; returns the exit code.

    That is rank 0's; 1 where a signal ended it or another rank failed first without a code of its
    own. Consumes: exits of ranks, signals; produces: ranks, and their end within ``GRACE_S`` of
    the first one's failure. Waits for the agent's thread, which ends when all ranks are gone.

    Raises ``ConfigError``: fewer GPUs than ranks.
    """
    visible = visible_gpus()
    if settled(learner.device) == "cuda" and visible < learner.ranks:
        raise ConfigError(
            f"learner.ranks = {learner.ranks}, but {visible} CUDA devices are visible, and every "
            "rank needs one: lower learner.ranks, look at CUDA_VISIBLE_DEVICES, or set "
            "learner.device = 'cpu'"
        )
    os.environ[LAUNCHER_PID_VARIABLE] = str(os.getpid())
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this host
    job = _Job(learner.ranks, argv)

    def pass_on(number: int, _frame: FrameType | None) -> None:
        for process in _ranks().values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)  # ranks other than 0 ignore it

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    watch_parent()
    # It warns that it cannot handle signals in a thread: that is done here, and ranks that are
    # orphaned are killed by the kernel.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.ERROR)
    job.thread.start()
    gone = _watch(job.thread)
    if job.problem is not None:
        raise job.problem
    return _exit_code(job.failures, gone)


def _watch(agent: threading.Thread) -> set[int]:
    """Wait for the agent; once a rank is gone, see that the others end soon. Returns which ranks
    were at the first look: in a life that ends well rank 0 is the first, see ``ranked.serve``."""
    known: dict[int, psutil.Process] = {}
    first: set[int] = set()
    since_s = 0.0
    while agent.is_alive():
        agent.join(_POLL_S)
        alive = _ranks()
        gone = known.keys() - alive.keys()
        if gone and not since_s:
            first, since_s = gone, time.monotonic()
        known |= alive
        if since_s and time.monotonic() - since_s > GRACE_S:
            for process in alive.values():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
    return first


def _ranks() -> dict[int, psutil.Process]:
    """The ranks that live, by number."""
    found: dict[int, psutil.Process] = {}
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            environment = child.environ() if child.status() != psutil.STATUS_ZOMBIE else {}
            if "LOCAL_RANK" in environment:  # not yet, between fork and exec
                found[int(environment["LOCAL_RANK"])] = child
    return found


def first_to_go(gone: Set[int], exit_codes: Mapping[int, int]) -> int:
    """Which of the ranks ``gone`` between two looks took the others along: rather one that a
    signal killed than one that ended by itself, for want of the other; and none that the agent
    ended by SIGTERM."""

    def order(rank: int) -> tuple[bool, bool, int]:
        return exit_codes[rank] == -signal.SIGTERM, exit_codes[rank] >= 0, rank

    return min((gone & exit_codes.keys()) or exit_codes.keys(), key=order)


def _exit_code(failures: Mapping[int, ProcessFailure], gone: set[int]) -> int:
    """Rank 0's own code where it has one: `ringasync up` knows by it what no restart can mend."""
    if not failures:
        return 0
    first = first_to_go(gone, {rank: one.exitcode for rank, one in failures.items()})
    for rank, failure in sorted(failures.items()):
        note = "; it went first, and the job with it" if rank == first else ""
        print(
            f"learner rank {rank} (pid {failure.pid}) ended: {describe_exit(failure.exitcode)}"
            f"{note}",
            file=sys.stderr,
            flush=True,
        )
    codes = [failures[rank].exitcode for rank in (0, first) if rank in failures]
    return next((code for code in codes if code > 0), 1)
