"""``python -m tests.chaos``: runs under faults until enough were felt; what ``make chaos`` runs."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from tests.e2e.tiny_run import build_tiny_model

from .campaign import LEG_PROMPTS, ChaosError, campaign
from .faults import DECK_SIZE
from .report import Report

MET_ALL = 3 * DECK_SIZE
"""After so many faults each kind must have been felt."""


def main() -> int:
    """The exit code: 1 when something does not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--faults", type=int, default=200, help="how many must be felt")
    parser.add_argument("--seed", type=int, default=0, help="of the first run; the next is one up")
    parser.add_argument("--prompts", type=int, default=LEG_PROMPTS, help="of each run")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="no run begins after so many"
    )
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that runs and mounts are undone
    folder = Path(tempfile.mkdtemp(prefix="ringasync-chaos-"))
    model = build_tiny_model(folder / "model")

    def keep(report: Report) -> None:
        if given.out:
            report.write(given.out.with_suffix(".json"))
            given.out.with_suffix(".md").write_text("\n".join(report.lines()) + "\n")

    try:
        report = campaign(
            folder, model, faults=given.faults, seed=given.seed, prompts=given.prompts,
            minutes=given.minutes, say=lambda line: print(line, flush=True), keep=keep,
        )  # fmt: skip
    except ChaosError as broken:
        print(broken)
        return 1
    print("\n".join(report.lines()))
    if report.faults >= MET_ALL and (missing := report.never_felt()):
        print(f"no fault of these kinds was felt: {', '.join(missing)}")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
