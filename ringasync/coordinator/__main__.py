"""``python -m ringasync.coordinator CONFIG [--set k=v] [--redis-url URL] [--model PATH]``."""

from __future__ import annotations

import sys

from ringasync.coordinator.app import Coordinator, Place
from ringasync.observability.log import configure_logging
from ringasync.runtime.role import RoleArgs, parse_role, run_role
from ringasync.runtime.shutdown import Shutdown


def main() -> int:
    """Run the coordinator; the exit code."""
    args = parse_role("ringasync.coordinator", "Feeds, watches and records a run.")
    return run_role(lambda shutdown: coordinate(args, shutdown))


async def coordinate(args: RoleArgs, shutdown: Shutdown) -> int:
    """One coordinator from start to end."""
    config = args.config
    level = config.observability.log_level
    configure_logging("coordinator", config.run.name, config.run_dir, level)
    return await Coordinator(config, Place(args.redis_url, args.model), shutdown).run()


if __name__ == "__main__":
    sys.exit(main())
