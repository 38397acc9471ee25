"""Pairs of settings about a shared device that cannot work together."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from ringasync.config.schema import Config


@pytest.mark.parametrize(
    ("schedule", "transport", "rule", "remedy"),
    [
        ("pipelined", "file", "needs schedule.mode = 'rounds'", "learner.device, worker.gpus"),
        ("rounds", "nccl", "weights.transport = 'nccl'", "use 'file'"),
    ],
)
def test_colocated_is_refused_where_it_cannot_be(
    schedule: str, transport: str, rule: str, remedy: str
) -> None:
    settings: dict[str, Any] = {
        "data": {"tasks": [{"name": "sums", "kind": "mathematics"}]},
        "schedule": {"mode": schedule, "colocated": True},
        "weights": {"transport": transport},
    }
    with pytest.raises(ValidationError, match=r"schedule\.colocated = true") as refused:
        Config.model_validate(settings)
    assert rule in str(refused.value)
    assert remedy in str(refused.value)
