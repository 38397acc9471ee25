"""What a weights folder says of its model, and settings of engines that do not exist."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ringasync.config.schema import Config
from ringasync.errors import ConfigError, EngineError
from workers.engines.factory import EngineFactory, read_limits
from workers.engines.vllm.engine import VllmEngine


def config(**worker: Any) -> Config:
    """A configuration with a window of 100 tokens."""
    return Config.model_validate(
        {
            "data": {"tasks": [{"name": "sums", "kind": "mathematics"}]},
            "model": {"max_model_len_tokens": 100},
            "sampling": {"max_new_tokens": 50},
            "worker": worker,
        }
    )


@pytest.mark.parametrize(
    ("model", "generation", "eos"),
    [
        ({"eos_token_id": 7}, None, (7,)),
        ({"eos_token_id": [7, 9]}, None, (7, 9)),
        ({"eos_token_id": 7}, {"eos_token_id": [8, 7]}, (7, 8)),
        ({"eos_token_id": None}, {"eos_token_id": 3}, (3,)),
        ({}, None, ()),
    ],
)
def test_eos_ids_come_from_both_files(
    tmp_path: Path, model: dict[str, Any], generation: dict[str, Any] | None, eos: tuple[int, ...]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(model | {"vocab_size": 30}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    limits = read_limits(tmp_path, config())
    assert limits.eos_token_ids == eos
    assert limits.vocab_size == 30
    assert limits.window_tokens == 100


def test_the_model_s_own_window_may_be_smaller(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 64}))
    assert read_limits(tmp_path, config()).window_tokens == 64


@pytest.mark.parametrize("content", [None, "not json", "[1]"])
def test_a_folder_without_a_readable_config_is_an_engine_error(
    tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(EngineError, match=r"config\.json"):
        read_limits(tmp_path, config())


@pytest.mark.parametrize(
    ("worker", "named"),
    [
        ({"engine_options": {"page_size": 3}}, "page_size"),
        ({"engine_options": {"gather_ms": "soon"}}, "gather_ms"),
    ],
)
def test_settings_of_an_engine_that_does_not_exist_are_named(
    worker: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        EngineFactory(config(**worker), 1).prepare()


def replaying() -> Config:
    """vLLM with routing replay; its engine is made without vLLM, which only ``start`` needs."""
    fields = config(engine="vllm").model_dump()
    fields["model"]["path"] = "somewhere"
    fields["loss"]["routing_replay"] = True
    return Config.model_validate(fields)


@pytest.mark.parametrize("model", [{"model_type": "qwen3"}, {"model_type": "mixtral"}, {}])
def test_replay_is_refused_for_models_whose_routing_is_not_known(
    tmp_path: Path, model: dict[str, Any]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(model))
    with pytest.raises(ConfigError, match=r"routing_replay.*needs a model of type qwen3_moe"):
        EngineFactory(replaying(), 1)(tmp_path)


def test_the_engine_is_asked_for_experts_only_where_they_are_replayed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    asked = EngineFactory(replaying(), 1)(tmp_path)
    plain = EngineFactory(config(engine="vllm"), 1)(tmp_path)
    assert isinstance(asked, VllmEngine)
    assert isinstance(plain, VllmEngine)
    assert (asked._routed_experts, plain._routed_experts) == (True, False)
