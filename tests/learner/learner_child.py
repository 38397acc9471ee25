"""A learner in a forked process: run by path (``runpy``) with ``ARGUMENTS`` as a global."""

from __future__ import annotations

import os
import sys
from typing import cast

from learner.__main__ import main

Arguments = tuple[list[str], dict[str, str], str]


def run(arguments: Arguments) -> None:
    """Write both outputs to the log, set the environment, and be ``python -m learner``."""
    argv, environment, log_path = arguments
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(environment)
    sys.exit(main(argv))


if __name__ == "__main__":
    run(cast(Arguments, globals()["ARGUMENTS"]))
