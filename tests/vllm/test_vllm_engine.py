"""The vLLM engine passes the contract, on whatever device vLLM runs here."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from ringasync.errors import EngineError
from tests.vllm.kit import engine_kit
from tests.vllm.models import write_dense
from tests.workers.engine_contract import EngineContract
from tests.workers.engine_kit import NEVER_SAMPLED, Collector, EngineKit
from workers.engines.base import Engine, SamplingParams


class KeptEngine:
    """One engine for many tests, because vLLM takes 20 s to start; anew where a test ended it."""

    def __init__(self, kit: EngineKit) -> None:
        self.kit = kit
        self.engine: Engine | None = None

    async def as_new(self) -> Engine:
        """A running engine under version 3 with nothing to do."""
        if self.engine is None or not await self._reset(self.engine):
            await self.stop()
            self.engine = self.kit.make(SamplingParams(1.0, (NEVER_SAMPLED,)))
            await self.engine.start(self.kit.weights(0), 3)
        return self.engine

    async def _reset(self, engine: Engine) -> bool:
        try:
            await engine.pause()
            await engine.load_weights(self.kit.weights(0), 3)
            await engine.resume()
            await Collector(engine).rest()
        except EngineError:
            return False
        return True

    async def stop(self) -> None:
        """End the engine, if there is one."""
        if self.engine is not None:
            await self.engine.stop()
            self.engine = None


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two dense policies of one shape, embeddings tied: on a CPU the cure is needed."""
    root = tmp_path_factory.mktemp("dense")
    return [write_dense(root / f"w{i}", seed=i, tied=True) for i in range(2)]


@pytest.fixture(scope="session")
def kit(folders: list[Path]) -> EngineKit:
    return engine_kit(folders)


@pytest_asyncio.fixture(scope="class", loop_scope="class")
async def kept(kit: EngineKit) -> AsyncIterator[KeptEngine]:
    """The engine of the class; it lives on one event loop, as its tests do."""
    one = KeptEngine(kit)
    yield one
    await one.stop()


@pytest.mark.asyncio(loop_scope="class")
@pytest.mark.timeout(300)
class TestVllmEngine(EngineContract):
    """All of the contract."""

    # pytest knows no type for a fixture on another loop
    @pytest_asyncio.fixture(loop_scope="class")
    async def engine(  # type: ignore[override]
        self, kept: KeptEngine
    ) -> AsyncIterator[Engine]:
        """A running engine at temperature 1 that never samples EOS, under version 3."""
        yield await kept.as_new()
