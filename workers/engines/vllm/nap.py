"""Sleep of vLLM's workers: the KV cache and the weights leave the GPU, requests stay.

Not ``AsyncLLM.sleep`` and ``wake_up``: the last wake resumes the scheduler, which would sample
before the worker has tried the new weights. The scheduler is paused by ``VllmEngine`` alone; only
vLLM's workers are told here, weights and KV cache apart, by the calls that EngineCore makes too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal


class Nap:
    """How much of an engine is asleep. Needs ``enable_sleep_mode`` where ``frees_memory``."""

    def __init__(self, level: Literal[1, 2], *, frees_memory: bool = False) -> None:
        self._level = level
        self._weights_asleep = False
        self.frees_memory = frees_memory
        """Whether anything leaves the device; if not, the engine only stands still."""
        self.is_asleep = False
        self.loaded: tuple[Path, int] | None = None
        self.are_weights_gone = False
        """Level 2: nothing was loaded since; what is live once they wake is not to be used."""

    def note_loaded(self, weights_dir: Path, policy_version: int) -> None:
        """These weights are live."""
        self.loaded = (weights_dir, policy_version)
        self.are_weights_gone = False

    async def fall_asleep(self, engine: Any) -> None:
        """The engine is paused and its requests hold no KV blocks."""
        if self.frees_memory:
            await engine.collective_rpc("sleep", kwargs={"level": self._level})
            self._weights_asleep = True
            self.are_weights_gone = self._level == 2
        self.is_asleep = True

    async def wake_weights(self, engine: Any) -> None:
        """Have memory for the weights again, with their values at level 1."""
        if self._weights_asleep:
            await engine.collective_rpc("wake_up", kwargs={"tags": ["weights"]})
            self._weights_asleep = False

    async def wake_up(self, engine: Any) -> None:
        """Have everything again; the engine stays paused."""
        if self.is_asleep and self.frees_memory:
            await self.wake_weights(engine)
            await engine.collective_rpc("wake_up", kwargs={"tags": ["kv_cache"]})
        self.is_asleep = False
