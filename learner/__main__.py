"""``python -m learner CONFIG [--set KEY=VALUE] [--redis-url URL] [--model PATH]``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ringasync.errors import RingError
from ringasync.observability.log import configure_logging
from ringasync.runtime.role import resolve_args, role_parser, run_role
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
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    config = args.config
    configure_logging("learner", config.run.name, config.run_dir, config.observability.log_level)
    from learner.app import LearnerOptions, run_learner  # torch loads late: refusals come at once

    async def life(shutdown: Shutdown) -> int:
        return await run_learner(LearnerOptions(args, not namespace.no_wait), shutdown)

    return run_role(life)


if __name__ == "__main__":
    raise SystemExit(main())
