"""Where a run's figures go beside ``metrics.jsonl``: TensorBoard and Weights & Biases."""

from __future__ import annotations

from typing import Any, Protocol

from ringasync.config.schema import Config
from ringasync.coordinator.extras import module_of_extra
from ringasync.observability.log import get_logger

log = get_logger(__name__)


class ScalarWriter(Protocol):
    """Takes the numbers of recorded lines. Nothing of it waits for a network, ``close`` aside."""

    def add(self, prefix: str, line: dict[str, Any], step: int, at_s: float) -> None:
        """The numbers of ``line`` as ``prefix/name`` at ``step``."""

    def flush(self) -> None:
        """Push out what is held back."""

    def close(self) -> None:
        """The run's figures are complete, or another process goes on with them."""


def open_writers(config: Config, first_ms: int) -> list[ScalarWriter]:
    """The writers that the configuration asks for. ``first_ms``: when the run first began.

    Raises:
        EnvironmentRefusedError: the packages of one that is off by default are missing.
    """
    wanted = config.observability
    writers: list[ScalarWriter] = []
    if wanted.tensorboard:
        try:
            from ringasync.coordinator.tensorboard import TensorBoardScalars
        except ImportError as error:
            log.warning("no TensorBoard files", why=str(error), remedy="pip install tensorboard")
        else:
            writers.append(TensorBoardScalars(config.run_dir / "tensorboard"))
    if wanted.wandb:
        module = module_of_extra(
            "ringasync.coordinator.wandb_scalars", "wandb", "observability.wandb"
        )
        writers.append(module.WandbScalars(config, f"{config.run.name}-{first_ms}"))
    return writers


def numbers(line: dict[str, Any]) -> list[tuple[str, float]]:
    """Names and numbers of a line; ``a.b`` for a number in a dictionary, no bool, no id."""
    found: list[tuple[str, float]] = []
    for name, value in line.items():
        if isinstance(value, dict):
            inner = ((f"{name}.{key}", item) for key, item in value.items())
            found += [(key, float(item)) for key, item in inner if _is_number(item)]
        elif _is_number(value) and name not in ("step", "at_ms"):
            found.append((name, float(value)))
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
