"""The transformers engine passes the contract with tiny Qwen3 models, tied and untied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from ringasync.errors import EngineError
from workers.engines.base import SamplingParams
from workers.engines.transformers_engine import TransformersEngine, TransformersOptions

from .engine_contract import EngineContract
from .engine_kit import NEVER_SAMPLED, Collector, EngineKit, prompts, request

VOCAB_SIZE = 64


def write_model(folder: Path, seed: int, tied: bool) -> Path:
    """A random two-layer Qwen3 whose distribution is far from flat."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@lru_cache(maxsize=4)
def _reference_model(weights: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        weights, dtype=torch.float32, attn_implementation="eager"
    )


@torch.no_grad()
def _reference(
    weights: Path, context: Sequence[int], tokens: Sequence[int], temperature: float
) -> npt.NDArray[np.float32]:
    """A plain forward over the whole context by stock transformers in eager attention."""
    if not tokens:
        return np.zeros(0, np.float32)
    logits = _reference_model(weights)(torch.tensor([[*context, *tokens]])).logits[
        0, len(context) - 1 : -1
    ]
    logprobs = (logits / temperature).log_softmax(-1)
    picked: npt.NDArray[np.float32] = logprobs.gather(1, torch.tensor(tokens)[:, None])[
        :, 0
    ].numpy()
    return picked


def _kill(engine: TransformersEngine) -> None:
    def broken(*_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError("broken by a test")

    engine._model.forward = broken


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """The engine's thread logs the death that a test causes; that is not this suite's output."""
    import logging

    logger = logging.getLogger("ContinuousBatchingLogger")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("tied")
    return [write_model(root / f"w{i}", i, tied=True) for i in range(2)]


@pytest.fixture
def kit(folders: list[Path]) -> EngineKit:
    return _kit(folders, "padded")


def _kit(folders: list[Path], attention: str) -> EngineKit:
    def make(sampling: SamplingParams) -> TransformersEngine:
        return TransformersEngine(
            sampling,
            max_concurrent=16,
            max_model_len_tokens=128,
            seed=5,
            options=TransformersOptions(
                page_size_tokens=16, max_batch_tokens=48, attention=attention
            ),
        )

    return EngineKit(
        make=make,
        weights=lambda i: folders[i],
        reference=_reference,
        kill=_kill,
        vocab_size=VOCAB_SIZE,
    )


class TestTransformersEngine(EngineContract):
    """All of the contract; ``max_batch_tokens`` is small, so that prompts are cut in pieces."""


async def test_untied_embeddings_are_swapped_and_read_back_too(tmp_path: Path) -> None:
    folders = [write_model(tmp_path / f"w{i}", i, tied=False) for i in range(2)]
    suite, kit = EngineContract(), _kit(folders, "padded")
    for test in (
        suite.test_in_flight_swap_keeps_logprobs_true_and_labels_exact,
        suite.test_read_back_equals_the_file,
    ):
        engine = kit.make(SamplingParams(1.0, (NEVER_SAMPLED,)))
        await engine.start(kit.weights(0), 3)
        await test(kit, engine)
        await engine.stop()


@pytest.mark.parametrize("attention", ["padded", "stock"])
async def test_both_attentions_agree_with_a_plain_forward(
    folders: list[Path], attention: str
) -> None:
    kit = _kit(folders, attention)
    engine = kit.make(SamplingParams(1.0, (NEVER_SAMPLED,)))
    await engine.start(kit.weights(0), 1)
    collector = Collector(engine)
    given = prompts(kit, 5)
    await engine.generate([request(f"r{i}", p, 20) for i, p in enumerate(given)])
    await collector.until_finished(*(f"r{i}" for i in range(5)))
    await engine.stop()
    for i, prompt in enumerate(given):
        got = collector[f"r{i}"]
        expected = _reference(kit.weights(0), prompt, got.tokens, 1.0)
        assert np.abs(np.asarray(got.logprobs) - expected).max() < 1e-4


async def test_kept_kv_shows_in_the_logprobs(folders: list[Path]) -> None:
    """``keep_kv`` is offered; this shows that recomputing is what makes the log-probs true."""
    engine = TransformersEngine(
        SamplingParams(1.0, (NEVER_SAMPLED,)),
        max_concurrent=4,
        max_model_len_tokens=128,
        seed=5,
        keep_kv=True,
    )
    await engine.start(folders[0], 1)
    collector = Collector(engine)
    await engine.generate([request("r", [1, 2, 3, 4], 60)])
    await collector.until_tokens("r", 5)
    await engine.pause()
    await collector.rest()
    cut = len(collector["r"].tokens)
    await engine.load_weights(folders[1], 2)
    await engine.resume()
    await collector.until_finished("r")
    await engine.stop()
    got = collector["r"]
    assert got.versions == [1] * cut + [2] * (60 - cut)
    expected = _reference(folders[1], [1, 2, 3, 4, *got.tokens[:cut]], got.tokens[cut:], 1.0)
    assert np.abs(np.asarray(got.logprobs[cut:]) - expected).max() > 1e-2


async def test_a_request_beyond_the_window_is_refused(kit: EngineKit) -> None:
    engine = kit.make(SamplingParams(1.0, ()))
    await engine.start(kit.weights(0), 1)
    with pytest.raises(ValueError, match="window"):
        await engine.generate([request("r", list(range(1, 60)), 100)])
    await engine.stop()


async def test_a_model_of_another_shape_is_refused_and_leaves_the_live_weights(
    kit: EngineKit, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    config = Qwen3Config.from_pretrained(kit.weights(0))
    config.num_hidden_layers, config.layer_types = 1, ["full_attention"]
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "smaller")
    engine = kit.make(SamplingParams(1.0, ()))
    await engine.start(kit.weights(0), 1)
    before = await engine.read_back()
    await engine.pause()
    with pytest.raises(EngineError, match="lacks tensors"):
        await engine.load_weights(tmp_path / "smaller", 2)
    assert await engine.read_back() == before
    await engine.stop()


async def test_a_bfloat16_folder_is_read_back_in_its_own_dtype(
    kit: EngineKit, tmp_path: Path
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(kit.weights(0), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    engine = kit.make(SamplingParams(1.0, ()))
    await engine.start(kit.weights(0), 1)
    await engine.pause()
    await engine.load_weights(tmp_path / "half", 2)
    got = await engine.read_back()
    await engine.stop()
    from safetensors.torch import load_file

    from workers.engines.live_weights import digest

    loaded = load_file(tmp_path / "half" / "model.safetensors")
    assert got == {name: digest(tensor, torch.bfloat16) for name, tensor in loaded.items()}
