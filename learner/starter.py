"""The starting model of the demo: built, fine-tuned on worked solutions, cached.

``python -m learner.starter CONFIG`` prints the model's folder; ``ringasync up`` runs it when
``model.path = "starter"``. The cache is ``$RINGASYNC_CACHE`` or ``~/.cache/ringasync``; its key is
a digest of everything that shapes the model.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ringasync.config.load import load_config
from ringasync.config.schema import Config
from ringasync.errors import ConfigError, RingError
from ringasync.runtime.role import report_error, role_parser

RECIPE_VERSION = 1
"""Raise it when the code below makes another model from the same settings."""

_BUILDING = ".building-"
_ABANDONED_S = 86_400.0

Report = Callable[[int, float], None]
"""Called after each step with the step number and the loss in nats a token."""


def cache_dir() -> Path:
    """Where starter models lie."""
    root = os.environ.get("RINGASYNC_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "ringasync") / "starter"


def starter_key(config: Config) -> str:
    """Digest of all that shapes the model: recipe, seed, tasks, template, held-out set.

    The device is left out: its arithmetic differs, the recipe does not.
    """
    parts = {
        "recipe": RECIPE_VERSION,
        "seed": config.run.seed,
        "starter": config.starter.model_dump(mode="json", exclude={"threads", "device"}),
        "data": config.data.model_dump(mode="json"),
        "held_out": [config.eval.seed, config.eval.prompts],
        "window": config.model.max_model_len_tokens,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def ensure_starter(config: Config, report: Report = lambda _step, _loss: None) -> Path:
    """Folder of the starter model in HF format, built if it is not cached.

    Raises:
        ConfigError: the tasks give no solutions to learn from.
    """
    folder = cache_dir() / f"{config.starter.architecture}-{starter_key(config)}"
    if (folder / "config.json").exists():
        return folder
    from learner.starter_training import train_starter

    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder.parent)
    made = Path(tempfile.mkdtemp(prefix=_BUILDING, dir=folder.parent))
    try:
        train_starter(config, made, report)
        with suppress(OSError):  # another process may have been faster
            made.rename(folder)
        if not (folder / "config.json").exists():
            raise ConfigError(f"the starting model could not be moved to {folder}: remove it first")
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def _remove_abandoned(parent: Path) -> None:
    """Builders that were killed leave half a model behind; a live one needs minutes, not a day."""
    for left in parent.glob(f"{_BUILDING}*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(left, ignore_errors=True)


@contextmanager
def progress(steps: int) -> Iterator[Report]:
    """A bar on a terminal's stderr, else a line now and then."""
    console = Console(stderr=True)
    if not console.is_terminal:
        every = max(1, steps // 10)

        def line(step: int, loss: float) -> None:
            if step % every == 0 or step == steps:
                console.print(f"starting model: step {step} of {steps}, loss {loss:.3f}")

        yield line
        return
    with Progress(
        TextColumn("building the starting model"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}{task.fields[loss]}"),
        TimeRemainingColumn(),
        console=console,
    ) as bar:
        task = bar.add_task("steps", total=steps, loss="")
        yield lambda step, loss: bar.update(task, completed=step, loss=f" loss {loss:.3f}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the last line on stdout is the model's folder."""
    parser = role_parser("python -m learner.starter", "Build the demo's starting model.")
    parser.add_argument(
        "--print-path", action="store_true", help="print nothing but the folder on stdout"
    )
    arguments = parser.parse_args(argv)
    try:
        config = load_config(arguments.config, arguments.overrides)
        if not arguments.print_path:
            print(f"cache: {cache_dir()}")
        with progress(config.starter.steps) as report:
            folder = ensure_starter(config, report)
    except RingError as error:
        return report_error(error)
    print(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
