"""``python -m learner CONFIG [--set KEY=VALUE] [--redis-url URL] [--model PATH]``."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from learner.rank_process import die_with_launcher, rank_of_this_process
from ringasync.errors import RingError
from ringasync.observability.log import configure_logging
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
    rank = rank_of_this_process() if config.learner.ranks > 1 else 0
    role = f"learner-rank-{rank}" if rank else "learner"
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
    from learner.app import LearnerOptions, run_learner

    async def life(shutdown: Shutdown) -> int:
        return await run_learner(LearnerOptions(args, not namespace.no_wait), shutdown)

    return run_role(life)


def run_follower(args: RoleArgs) -> int:
    """A rank other than 0 to its end; stop requests are rank 0's to act on."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    from learner.app import follow

    try:
        follow(args.config, args.model)
    except RingError as error:
        return report_error(error)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
