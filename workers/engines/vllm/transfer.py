"""Our weight transfer engine: loads what ``staging`` has read into the live model.

Pull, not push: the worker says which folder, nobody waits for anybody. It runs in vLLM's worker
processes, registered by ``plugin``; vLLM calls start, receive and finish under a paused scheduler.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from workers.engines.vllm import cpu_cures
from workers.engines.vllm.live_layout import LiveLayout
from workers.engines.vllm.staging import STAGER


@dataclass
class FolderInitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing: there is no group to join."""


@dataclass
class FolderUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """The staged folder to load, and how: ``auto``, ``layerwise`` or ``direct``."""

    weights_dir: str
    load: str = "auto"


class FolderTransferEngine(WeightTransferEngine[FolderInitInfo, FolderUpdateInfo]):  # type: ignore[misc]
    """Layerwise by vLLM's own reload, or straight into the parameters where all are plain."""

    init_info_cls = FolderInitInfo
    update_info_cls = FolderUpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._layerwise = False
        self._layout: LiveLayout | None = None

    def init_transfer_engine(self, init_info: FolderInitInfo) -> None:
        """Nothing to do."""

    def start_weight_update(self) -> None:
        """Nothing yet: how to load is said with the update."""

    def receive_weights(self, update_info: FolderUpdateInfo) -> None:
        """Load the staged tensors. Raises ``RuntimeError`` when another folder is staged."""
        staged = STAGER.staged
        if staged is None or staged.folder != Path(update_info.weights_dir):
            raise RuntimeError(f"{update_info.weights_dir} was not staged")
        if update_info.load != "layerwise" and self._load_direct(staged.tensors):
            return
        if update_info.load == "direct":
            raise RuntimeError("this model has tensors whose place in the live model is not plain")
        self._load_layerwise(staged.tensors)

    def finish_weight_update(self) -> None:
        """End a layerwise reload; on a CPU, mend what it leaves wrong."""
        if not self._layerwise:
            return
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        self._layerwise = False
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            cpu_cures.after_reload(self.model)

    def shutdown(self) -> None:
        """Nothing is held."""

    @staticmethod
    def trainer_send_weights(iterator: Iterator[Any], trainer_args: Any) -> None:
        """vLLM 0.26 wants the method; the learner publishes folders instead."""
        raise NotImplementedError("weights are pulled, not sent")

    def _load_direct(self, tensors: dict[str, torch.Tensor]) -> bool:
        if self._layout is None:
            self._layout = LiveLayout(self.model)
        if not self._layout.is_plain(tensors):
            return False
        self._layout.copy_in(tensors)
        return True

    def _load_layerwise(self, tensors: dict[str, torch.Tensor]) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)
        self._layerwise = True
        self.model.load_weights(
            (name, tensor.to(self.device, non_blocking=True)) for name, tensor in tensors.items()
        )
