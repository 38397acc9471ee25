"""``python -m workers CONFIG``: one rollout worker."""

from __future__ import annotations

from collections.abc import Sequence

from ringasync.errors import RingError
from ringasync.runtime.role import report_error, resolve_args, role_parser, run_role


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the worker role; returns the exit code (see ``ringasync.errors``)."""
    parser = role_parser("python -m workers", "Generates rollouts for a run; start any number.")
    parser.add_argument(
        "--worker-id", default="", help="stable name of this worker in logs and top"
    )
    namespace = parser.parse_args(argv)
    try:
        args = resolve_args(namespace)
    except RingError as error:
        return report_error(error)
    # Imported late: --help and a wrong configuration must not wait for heavy libraries.
    from workers.app import work_role

    return run_role(lambda shutdown: work_role(args, shutdown, namespace.worker_id))


if __name__ == "__main__":
    raise SystemExit(main())
