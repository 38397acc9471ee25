"""Fixtures of the learner's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from .kit import tiny_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 in HF format."""
    directory = tmp_path_factory.mktemp("tiny-qwen3")
    tiny_model().save_pretrained(directory)  # type: ignore[operator]
    return directory
