"""Figures at Weights & Biases too (``observability.wandb``); imported only where it is set."""

from __future__ import annotations

import queue
import threading
from typing import Any

import wandb

from ringasync.config.schema import Config
from ringasync.coordinator.scalars import numbers
from ringasync.observability.log import get_logger

CLOSE_TIMEOUT_S = 20.0

log = get_logger(__name__)
Row = dict[str, float]


class WandbScalars:
    """Everything of wandb's runs in a thread of its own: its calls wait for the network.

    Its own figures of the machine, its copies of source and console, and the host's name stay
    here: the run's figures and configuration go out, nothing else.
    """

    def __init__(self, config: Config, run_id: str) -> None:
        self._config, self._run_id = config, run_id
        self._rows: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send, name="wandb", daemon=True)
        self._thread.start()

    def add(self, prefix: str, line: dict[str, Any], step: int, at_s: float) -> None:
        """Hand the numbers of ``line`` over."""
        row = {f"{prefix}/{name}": number for name, number in numbers(line)}
        if row:
            self._rows.put({**row, f"{prefix}/step": float(step)})

    def flush(self) -> None:
        """It sends as it sees fit."""

    def close(self) -> None:
        """End the run there; what has not gone out in time stays in its folder."""
        self._rows.put(None)
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            log.warning(
                "Weights & Biases has not taken all figures in time",
                remedy=f"wandb sync {self._config.run_dir}/wandb/run-*",
            )

    def _send(self) -> None:
        try:
            run = self._begin()
            while (row := self._rows.get()) is not None:
                run.log(row)
            run.finish()
        except Exception as error:
            # Whatever is wrong with account or network, the figures are in metrics.jsonl as well.
            log.warning(
                "no figures at Weights & Biases",
                why=str(error),
                remedy="set WANDB_API_KEY, or WANDB_MODE=offline and sync later",
            )

    def _begin(self) -> Any:
        config = self._config
        run = wandb.init(
            project=config.observability.wandb,
            id=self._run_id,
            name=config.run.name,
            resume="allow",
            dir=config.run_dir,
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(
                console="off",
                host="",
                username="",
                silent=True,
                disable_code=True,
                disable_git=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )
        run.define_metric("train/*", step_metric="train/step")
        return run
