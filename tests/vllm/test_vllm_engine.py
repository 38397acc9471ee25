"""The vLLM engine passes the contract, on whatever device vLLM runs here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vllm.kit import engine_kit
from tests.vllm.models import write_dense
from tests.workers.engine_contract import EngineContract
from tests.workers.engine_kit import EngineKit

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two dense policies of one shape, embeddings tied: on a CPU the cure is needed."""
    root = tmp_path_factory.mktemp("dense")
    return [write_dense(root / f"w{i}", seed=i, tied=True) for i in range(2)]


@pytest.fixture
def kit(folders: list[Path]) -> EngineKit:
    return engine_kit(folders)


class TestVllmEngine(EngineContract):
    """All of the contract."""
