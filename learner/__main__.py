"""``python -m learner CONFIG [--set KEY=VALUE] [--redis-url URL] [--model PATH]``."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence

from learner.rank_process import (
    die_with_launcher,
    other_node,
    rank_of_this_process,
    tell_launcher,
)
from ringasync.config.schema import LearnerConfig
from ringasync.errors import RingError
from ringasync.observability.log import configure_logging
from ringasync.runtime.heavy_imports import heavy_imports
from ringasync.runtime.role import RoleArgs, report_error, resolve_args, role_parser, run_role
from ringasync.runtime.shutdown import Shutdown


def main(argv: Sequence[str] | None = None) -> int:
    """Run a learner to its end; returns the process's exit code."""
    parser = role_parser("learner", "Train on ready groups and publish weights.")
    parser.add_argument(
        "--no-wait",
        action="store_true",
        help="exit with code 4 when another learner holds the run, instead of waiting",
    )
    namespace = parser.parse_args(argv)
    try:
        args = resolve_args(namespace)
    except RingError as error:
        return report_error(error)
    config = args.config
    is_one_process = config.learner.ranks == 1 and os.environ.get("PET_NNODES", "1") == "1"
    rank = 0 if is_one_process else rank_of_this_process()
    role = f"learner-rank-{rank}" if rank else "learner"
    if rank is None and (node := other_node(os.environ)):
        role = f"learner-node-{node}"
    configure_logging(role, config.run.name, config.run_dir, config.observability.log_level)
    # torch loads late: refusals come at once
    if rank is None:
        from learner.launch import launch

        try:
            return launch(config.learner, list(sys.argv[1:] if argv is None else argv))
        except RingError as error:
            return report_error(error)
    if config.learner.ranks > 1:
        die_with_launcher()
    if rank:
        return run_follower(args)
    with heavy_imports():
        from learner.app import LearnerOptions, run_learner

    async def life(shutdown: Shutdown) -> int:
        try:
            return await run_learner(LearnerOptions(args, not namespace.no_wait), shutdown)
        except RingError as error:
            tell_launcher(error)
            raise

    return _left(config.learner, run_role(life))


def run_follower(args: RoleArgs) -> int:
    """A rank other than 0 to its end; stop requests are rank 0's to act on."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    with heavy_imports():
        from learner.app import follow

    try:
        follow(args.config, args.model)
    except RingError as error:
        tell_launcher(error)
        return report_error(error)
    return _left(args.config.learner, 0)


def _left(learner: LearnerConfig, code: int) -> int:
    """``code``; a process that was in a process group ends here.

    Python's own end takes the group down: a thread of gloo that still lets go of its last tensor
    then aborts the process, and DeepSpeed takes longer than the launcher waits for the last rank.
    """
    if learner.backend == "deepspeed" or learner.ranks > 1:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
