"""Starts the ranks of one learner by torchrun's agent, and ends all of them when one is gone.

The launcher is the learner's process for ``ringasync up`` and for a shell: it hands SIGTERM and
SIGINT to rank 0 and ends with rank 0's exit code. On several nodes (``learner.nodes``) each has
a launcher, and one whose ranks are gone ends the others.
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
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from learner.backends.zero_engine import require_deepspeed
from learner.devices import settled, visible_gpus
from learner.nodes import ENDING_S, START_TIMEOUT_S, Ending, Nodes, NodeWatch
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

    def __init__(self, ranks: int, nodes: Nodes, argv: list[str]) -> None:
        self.failures: Mapping[int, ProcessFailure] = {}
        self.problem: BaseException | None = None
        alone = nodes.count == 1
        self._config = LaunchConfig(
            min_nodes=nodes.count,
            max_nodes=nodes.count,
            nproc_per_node=ranks,
            run_id=f"learner-{os.getpid()}" if alone else "learner",
            # Static: node 0 has rank 0. The other backend numbers nodes as it likes.
            rdzv_backend="c10d" if alone else "static",
            rdzv_endpoint=f"{_HOST}:0" if alone else nodes.endpoint,
            rdzv_configs={} if alone else {"rank": nodes.this, "timeout": START_TIMEOUT_S},
            local_addr=_HOST if alone else None,
            max_restarts=0,  # `ringasync up` starts the whole learner anew, from its checkpoint
            monitor_interval=_POLL_S,
            logs_specs=DefaultLogsSpecs(),
        )
        self._argv = argv
        # A daemon: it waits for other nodes, which may never come.
        self.thread = threading.Thread(target=self._run, name="torchrun", daemon=not alone)

    def _run(self) -> None:
        try:
            elastic_launch(self._config, sys.executable)("-u", "-m", "learner", *self._argv)
        except ChildFailedError as error:
            self.failures = error.failures
        except BaseException as error:  # raised again in the main thread
            self.problem = error


def launch(learner: LearnerConfig, argv: list[str]) -> int:
    """Run ``python -m learner ARGV`` on this node's share of ``learner.ranks`` to the end; returns
    the exit code.

    That is a code above 1 that says why, a lower rank's before another's (7: rank 1 ran out of
    memory); 1 without any. Consumes: exits of ranks, signals, news of other nodes; produces: ranks,
    and their end within ``GRACE_S`` of the first one's failure. Waits for the agent's thread, which
    ends when all ranks are gone, or for the loss of a node.

    Raises ``ConfigError``: fewer GPUs than ranks, DeepSpeed is wanted and not installed, or the
    nodes are badly described.
    """
    nodes, ranks = _share(learner)
    os.environ[LAUNCHER_PID_VARIABLE] = str(os.getpid())
    if nodes.count == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this host
    job = _Job(ranks, nodes, argv)
    watch = NodeWatch(nodes) if nodes.count > 1 else None
    stopped = threading.Event()

    def pass_on(number: int, _frame: FrameType | None) -> None:
        stopped.set()
        _signal_ranks(number)  # ranks other than 0 ignore it
        if watch is not None and nodes.this:
            watch.ask_stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    watch_parent()
    # It warns that it cannot handle signals in a thread: that is done here, and ranks that are
    # orphaned are killed by the kernel.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.ERROR)
    job.thread.start()
    try:
        code = _outcome(job, _watch(job.thread, watch, stopped), nodes, watch)
    finally:
        has_closed = watch is None or watch.close()
    if job.thread.is_alive() or not has_closed:
        # It waits in torch's C++ for nodes that do not come. If it woke while the interpreter ends,
        # the process would abort, with another exit code than this.
        logging.shutdown()
        os._exit(code)
    return code


def _share(learner: LearnerConfig) -> tuple[Nodes, int]:
    """This node's place, and how many ranks it starts. Raises ``ConfigError``, see ``launch``."""
    if learner.backend == "deepspeed":
        require_deepspeed()
    nodes = Nodes.of(os.environ)
    ranks, visible = nodes.ranks_here(learner.ranks), visible_gpus()
    if settled(learner.device) == "cuda" and visible < ranks:
        here = f" on {nodes.count} nodes" if nodes.count > 1 else ""
        raise ConfigError(
            f"learner.ranks = {learner.ranks}{here}, but {visible} CUDA devices are visible, and "
            "every rank needs one: lower learner.ranks, look at CUDA_VISIBLE_DEVICES, or set "
            "learner.device = 'cpu'"
        )
    return nodes, ranks


def _outcome(job: _Job, gone: set[int] | None, nodes: Nodes, watch: NodeWatch | None) -> int:
    """Say how the job ended, after telling the other nodes and hearing of them; the exit code."""
    if isinstance(job.problem, DistError):
        _say(
            f"learner node {nodes.this} did not find all {nodes.count} nodes at {nodes.endpoint} "
            f"(PET_RDZV_ENDPOINT), or lost them: {job.problem}"
        )
        return 1
    if job.problem is not None:
        raise job.problem
    own = _ending(job.failures, gone)
    if watch is None:
        return _exit_code(own, {}, nodes.this)
    if gone is None or not (own.exit_codes or job.thread.is_alive()):
        return 0  # stopped before the nodes were together, or all ended well
    untold = watch.exchange(own, ENDING_S)
    for node in untold:
        _say(f"learner node {node} does not answer any more, and the job ends: look at its log")
    return _exit_code(own, watch.endings, nodes.this, bool(untold)) or 1


def _watch(
    agent: threading.Thread, nodes: NodeWatch | None, stopped: threading.Event
) -> set[int] | None:
    """Wait for the agent; once a rank or a node is gone, see that the others end soon. Returns
    which ranks of this node were at the first look: in a life that ends well rank 0 is the first,
    see ``ranked.serve``. None: ``stopped`` while this node waited for others to come."""
    known: dict[int, psutil.Process] = {}
    first: set[int] = set()
    since_s = 0.0
    while agent.is_alive():
        agent.join(_POLL_S)
        alive = _ranks()
        gone = known.keys() - alive.keys()
        known |= alive
        lost = False
        if nodes is not None:
            if stopped.is_set() and not known:
                return None
            if nodes.stop_asked.is_set() and alive and not stopped.is_set():
                stopped.set()
                _signal_ranks(signal.SIGTERM)
            lost = nodes.has_lost_some()
        if (gone or lost) and not since_s:
            first, since_s = gone, time.monotonic()
        over_s = time.monotonic() - since_s if since_s else 0.0
        if over_s > GRACE_S:
            for process in alive.values():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        if lost and not alive and over_s > 2 * GRACE_S:
            break  # it had time to take note of its ranks' ends, and waits for that node's agent
    return first


def _signal_ranks(number: int) -> None:
    for process in _ranks().values():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _ranks() -> dict[int, psutil.Process]:
    """This node's ranks that live, by number."""
    found: dict[int, psutil.Process] = {}
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            environment = child.environ() if child.status() != psutil.STATUS_ZOMBIE else {}
            # Not yet between fork and exec, and in part only while exec is at it.
            if environment.keys() >= {"LOCAL_RANK", "RANK"} and environment["RANK"].isdigit():
                found[int(environment["RANK"])] = child
    return found


def first_to_go(gone: Set[int], exit_codes: Mapping[int, int]) -> int:
    """Which of the ranks ``gone`` between two looks took the others along: rather one that a
    signal killed, or that left with a code of its own, than one that ended by a traceback, for
    want of the other; and none that the agent ended by SIGTERM."""

    def order(rank: int) -> tuple[bool, bool, bool, int]:
        code = exit_codes[rank]
        return code == -signal.SIGTERM, code >= 0, code == 1, rank

    return min((gone & exit_codes.keys()) or exit_codes.keys(), key=order)


def _ending(failures: Mapping[int, ProcessFailure], gone: Set[int] | None) -> Ending:
    said = {
        rank: f"{failure.message}"  # what `tell_launcher` left
        for rank, failure in failures.items()
        if failure.exitcode > 1 and failure.error_file_data.get("message") == failure.message
    }
    codes = {rank: failure.exitcode for rank, failure in failures.items()}
    pids = {rank: failure.pid for rank, failure in failures.items()}
    return Ending(codes, sorted(gone or ()), said, pids)


def _exit_code(
    own: Ending, elsewhere: Mapping[int, Ending], this: int, has_lost_a_node: bool = False
) -> int:
    """A code that says why, where a rank has one: `ringasync up` knows by it what no restart can
    mend. ``own`` is node ``this``'s, ``elsewhere`` is by node. With a node lost, none of the ranks
    that are known of went first."""
    by_node = {**elsewhere, this: own}
    codes = {rank: code for one in by_node.values() for rank, code in one.exit_codes.items()}
    gone = {rank for one in by_node.values() for rank in one.gone}
    first = first_to_go(gone, codes) if codes and not has_lost_a_node else None
    for node, ending in sorted(by_node.items()):
        where = f" on node {node}" if elsewhere else ""
        for rank, code in sorted(ending.exit_codes.items()):
            note = "; it went first, and the job with it" if rank == first else ""
            if rank in ending.said:
                note += f": {ending.said[rank]}"
            _say(
                f"learner rank {rank} (pid {ending.pids[rank]}){where} ended: "
                f"{describe_exit(code)}{note}"
            )
    wanted = [codes[rank] for rank in sorted(codes)]
    return next((code for code in wanted if code > 1), 1) if codes else 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
