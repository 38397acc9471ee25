"""Engines as a configuration asks for them, and what a weights folder says of its model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ringasync.config.schema import Config
from ringasync.errors import ConfigError, EngineError
from ringasync.observability.log import get_logger
from ringasync.records.routing import MODEL_TYPES
from ringasync.runtime.heavy_imports import heavy_imports
from workers.engines.base import Engine, SamplingParams
from workers.engines.scripted import ScriptedEngine, ScriptedOptions
from workers.engines.vllm.options import VllmOptions
from workers.intake import ModelLimits
from workers.throttle import gather_tokens

log = get_logger()


@dataclass(frozen=True, slots=True)
class EngineFactory:
    """Makes engines for weights folders; ``seed`` differs between workers."""

    config: Config
    seed: int

    def prepare(self) -> None:
        """Check the settings and load the engine's libraries, which takes seconds.

        Call it before the session is opened: a heartbeat does not wait that long. Raises
        ``ConfigError`` for an option that the engine does not have, ``EnvironmentRefusedError``
        when its libraries are missing or too old.
        """
        with heavy_imports():
            if self.config.worker.engine == "vllm":
                from workers.engines.vllm import setup

                setup.prepare()
            self._options()
        if self.config.worker.engine != "vllm" and self.config.weights.transport == "nccl":
            log.info(
                "this engine reads the files that the learner publishes: only vLLM pulls by nccl",
                engine=self.config.worker.engine,
            )

    def __call__(self, weights_dir: Path) -> Engine:
        """An engine that is not started yet.

        Raises ``EngineError`` when the folder is no model, ``ConfigError`` when it is one whose
        routing cannot be replayed and ``loss.routing_replay`` is on.
        """
        if self.config.loss.routing_replay:
            _require_replayable(weights_dir)
        eos = read_limits(weights_dir, self.config).eos_token_ids
        sampling = SamplingParams(self.config.sampling.temperature, eos)
        make = {
            "transformers": self._transformers,
            "vllm": self._vllm,
            "scripted": self._scripted,
        }[self.config.worker.engine]
        return make(sampling)

    def _transformers(self, sampling: SamplingParams) -> Engine:
        from workers.engines.transformers_engine import TransformersEngine

        config, worker = self.config, self.config.worker
        return TransformersEngine(
            sampling,
            max_concurrent=worker.max_concurrent,
            max_model_len_tokens=config.model.max_model_len_tokens,
            seed=self.seed,
            keep_kv=worker.kv == "keep",
            threads=worker.threads,
            gather_tokens=gather_tokens(worker.flush_tokens),
            options=self._options(),
        )

    def _vllm(self, sampling: SamplingParams) -> Engine:
        from workers.engines.vllm.engine import VllmEngine

        config, worker = self.config, self.config.worker
        return VllmEngine(
            sampling,
            max_concurrent=worker.max_concurrent,
            max_model_len_tokens=config.model.max_model_len_tokens,
            seed=self.seed,
            dtype=config.model.dtype,
            fp32_head=config.model.head_dtype == "float32",
            kv=worker.kv,
            gather_tokens=gather_tokens(worker.flush_tokens),
            routed_experts=config.loss.routing_replay,
            colocated=config.schedule.colocated,
            options=self._options(),
        )

    def _scripted(self, sampling: SamplingParams) -> Engine:
        options: ScriptedOptions = self._options()
        return ScriptedEngine(
            sampling,
            step_interval_s=options.step_interval_s,
            max_concurrent=self.config.worker.max_concurrent,
            seed=self.seed,
        )

    def _options(self) -> Any:
        kind: Any = ScriptedOptions if self.config.worker.engine == "scripted" else VllmOptions
        if self.config.worker.engine == "transformers":
            from workers.engines.transformers_engine import TransformersOptions

            kind = TransformersOptions
        try:
            return TypeAdapter(kind).validate_python(
                self.config.worker.engine_options, extra="forbid"
            )
        except ValidationError as error:
            raise ConfigError(f"worker.engine_options: {error}") from None


def read_limits(weights_dir: Path, config: Config) -> ModelLimits:
    """EOS ids, vocabulary and window, from ``config.json`` and ``generation_config.json``.

    Raises ``EngineError`` when ``config.json`` is no JSON object.
    """
    model = _read_json(weights_dir / "config.json")
    generation = weights_dir / "generation_config.json"
    told = _read_json(generation) if generation.exists() else {}
    eos: set[int] = set()
    for fields in (model, told):
        value = fields.get("eos_token_id")
        eos.update(value if isinstance(value, list) else [] if value is None else [value])
    window = config.model.max_model_len_tokens
    trained = model.get("max_position_embeddings")
    return ModelLimits(
        window_tokens=min(window, trained) if isinstance(trained, int) else window,
        eos_token_ids=tuple(sorted(eos)),
        vocab_size=int(model.get("vocab_size") or 0),
    )


def _require_replayable(weights_dir: Path) -> None:
    found = _read_json(weights_dir / "config.json").get("model_type")
    if found not in MODEL_TYPES:
        raise ConfigError(
            f"loss.routing_replay = true needs a model of type {', '.join(MODEL_TYPES)}, and "
            f"{weights_dir} is {found!r}: set it to false"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise EngineError(f"{path} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise EngineError(f"{path} is not a JSON object")
    return fields
