"""These tests need vLLM, which has a virtual environment of its own: ``make test-vllm``."""

from __future__ import annotations

import importlib.util

import pytest

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]

_OF_VLLM = (
    "ignore:.*torch.jit.*:DeprecationWarning",
    "ignore:Unclosed context <zmq:ResourceWarning",
    "ignore:unclosed context <zmq:ResourceWarning",
)
"""Warnings that vLLM and its libraries give whatever we do; all others are errors."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let vLLM's own warnings pass in this folder."""
    for item in items:
        if "vllm" in item.path.parts:
            for rule in _OF_VLLM:
                item.add_marker(pytest.mark.filterwarnings(rule))
