"""A coordinator process with scripted prompts: ``... tests.coordinator.child FILE URL SIZE``."""

from __future__ import annotations

import sys
from pathlib import Path

from ringasync.config.load import config_from_json
from ringasync.config.schema import Config
from ringasync.coordinator.app import Coordinator, Place
from ringasync.coordinator.prompts import PromptSource
from ringasync.observability.log import configure_logging
from ringasync.runtime.role import run_role
from tests.coordinator.crew import words_source


def main() -> int:
    """Run it as ``python -m ringasync.coordinator`` does."""
    config = config_from_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    size = int(sys.argv[3]) or None

    def source(wanted: Config, model: str) -> PromptSource:
        return words_source(wanted, model, size=size)

    configure_logging("coordinator", config.run.name, config.run_dir, "debug")
    place = Place(sys.argv[2], "none")
    return run_role(lambda shutdown: Coordinator(config, place, shutdown, source=source).run())


if __name__ == "__main__":
    sys.exit(main())
