"""Pairs of settings that cannot work together."""

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


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"worker": {"engine": "transformers"}}, 'worker.engine = "transformers"'),
        ({"loss": {"routing_replay": True}}, "loss.routing_replay = true"),
        ({"schedule": {"mode": "rounds", "colocated": True}}, "schedule.colocated = true"),
    ],
)
def test_rolling_kv_is_refused_where_it_cannot_be(
    changes: dict[str, dict[str, Any]], rule: str
) -> None:
    settings: dict[str, Any] = {
        "data": {"tasks": [{"name": "sums", "kind": "mathematics"}]},
        "starter": {"architecture": "qwen3_moe"},
        **changes,
        "worker": {"engine": "vllm", "kv": "rolling"} | changes.get("worker", {}),
    }
    with pytest.raises(ValidationError, match=r'worker\.kv = "rolling" cannot go with') as refused:
        Config.model_validate(settings)
    assert rule in str(refused.value)
    assert 'use "recompute"' in str(refused.value)


@pytest.mark.parametrize("name", ["router_balance_coef", "router_z_coef"])
def test_router_losses_are_refused_for_a_dense_starter(name: str) -> None:
    settings: dict[str, Any] = {
        "data": {"tasks": [{"name": "sums", "kind": "mathematics"}]},
        "loss": {name: 1e-5},
    }
    with pytest.raises(ValidationError, match=r"a dense model has no router; set them to 0"):
        Config.model_validate(settings)
    Config.model_validate({**settings, "starter": {"architecture": "qwen3_moe"}})
    Config.model_validate({**settings, "model": {"path": "some/model"}})


@pytest.mark.parametrize("name", ["routing_replay", "router_balance_coef", "router_z_coef"])
def test_compiled_layers_are_refused_where_routers_have_hooks(name: str) -> None:
    settings: dict[str, Any] = {
        "data": {"tasks": [{"name": "sums", "kind": "mathematics"}]},
        "starter": {"architecture": "qwen3_moe"},
        "worker": {"engine": "vllm"},
        "loss": {name: True if name == "routing_replay" else 0.1},
        "learner": {"compile": True},
    }
    with pytest.raises(ValidationError, match=r"learner\.compile = true cannot go") as refused:
        Config.model_validate(settings)
    assert f"loss.{name}" in str(refused.value)
    assert "set learner.compile = false" in str(refused.value)
    settings["loss"], settings["learner"]["ranks"] = {}, 2
    Config.model_validate(settings)


@pytest.mark.parametrize(
    ("changes", "rule", "remedy"),
    [
        ({"learner": {"device": "cuda:1"}}, "learner.device = 'cuda:1'", "CUDA_VISIBLE_DEVICES"),
        (
            {"schedule": {"mode": "rounds", "colocated": True}},
            "schedule.colocated = true",
            "set learner.ranks = 1",
        ),
    ],
)
def test_ranks_are_refused_where_they_cannot_be(
    changes: dict[str, dict[str, Any]], rule: str, remedy: str
) -> None:
    settings: dict[str, Any] = {
        "data": {"tasks": [{"name": "sums", "kind": "mathematics"}]},
        **changes,
        "learner": {"ranks": 2} | changes.get("learner", {}),
    }
    with pytest.raises(ValidationError, match=r"learner\.ranks = 2 cannot go with") as refused:
        Config.model_validate(settings)
    assert rule in str(refused.value)
    assert remedy in str(refused.value)
    settings["learner"]["ranks"] = 1
    Config.model_validate(settings)
