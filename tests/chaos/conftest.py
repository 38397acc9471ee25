"""One tiny model for all chaos tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.tiny_run import build_tiny_model


@pytest.fixture(scope="session")
def chaos_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer model with its tokenizer."""
    return build_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
