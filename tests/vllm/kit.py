"""Engines, references and processes for the vLLM tests."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.vllm.faulty import FAULT_VARIABLE
from tests.vllm.models import VOCAB_SIZE
from tests.workers.engine_kit import NEVER_SAMPLED, EngineKit
from workers.engines.base import SamplingParams
from workers.engines.vllm import setup
from workers.engines.vllm.engine import Kv, VllmEngine
from workers.engines.vllm.options import VllmOptions

ON_GPU = torch.cuda.is_available()
MAX_GAP_NATS = 0.5 if ON_GPU else 1e-4
"""Half precision on a GPU; a stale cache or wrong weights are off by nats."""


@lru_cache(maxsize=8)
def reference_model(weights: Path) -> Any:
    """The same weights in stock transformers, float32 on the CPU."""
    return AutoModelForCausalLM.from_pretrained(
        weights, dtype=torch.float32, attn_implementation="eager"
    )


@torch.no_grad()
def reference(
    weights: Path, context: Sequence[int], tokens: Sequence[int], temperature: float = 1.0
) -> npt.NDArray[np.float32]:
    """Log-probs by a plain forward over the whole context."""
    if not tokens:
        return np.zeros(0, np.float32)
    logits = reference_model(weights)(torch.tensor([[*context, *tokens]])).logits
    logprobs = (logits[0, len(context) - 1 : -1] / temperature).log_softmax(-1)
    picked: npt.NDArray[np.float32] = logprobs.gather(1, torch.tensor(tokens)[:, None])[
        :, 0
    ].numpy()
    return picked


def make_engine(
    sampling: SamplingParams | None = None,
    *,
    kv: Kv = "recompute",
    window_tokens: int = 128,
    routed_experts: bool = False,
    **options: Any,
) -> VllmEngine:
    """A small engine; ``options`` are ``VllmOptions``. Without ``sampling``: T = 1, no end."""
    setup.prepare()
    small = {"kv_cache_bytes": 64 << 20, "enforce_eager": True, "gather_ms": 5}
    return VllmEngine(
        sampling or SamplingParams(1.0, (NEVER_SAMPLED,)),
        max_concurrent=16,
        max_model_len_tokens=window_tokens,
        seed=5,
        dtype="bfloat16" if ON_GPU else "float32",
        kv=kv,
        routed_experts=routed_experts,
        colocated=ON_GPU,
        options=VllmOptions(**small | options),
    )


@contextmanager
def faulty_engine(fault: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[VllmEngine]:
    """An engine whose vLLM worker has a fault; see ``faulty``."""
    monkeypatch.setenv(FAULT_VARIABLE, fault)
    yield make_engine(engine_args={"worker_extension_cls": "tests.vllm.faulty.FaultyExtension"})


def engine_kit(folders: Sequence[Path]) -> EngineKit:
    """What the contract needs, for weights folders of one shape."""
    return EngineKit(
        make=make_engine,
        weights=lambda i: folders[i],
        reference=reference,
        kill=kill,
        vocab_size=VOCAB_SIZE,
        max_gap_nats=MAX_GAP_NATS,
    )


def engine_processes(of: int | None = None) -> list[psutil.Process]:
    """vLLM's own processes below this one, or below process ``of``."""
    found = []
    for child in psutil.Process(of).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # gone, or ended and not yet waited for
            if "resource_tracker" not in " ".join(child.cmdline()):
                found.append(child)
    return found


def kill(engine: VllmEngine) -> None:
    """SIGKILL EngineCore, as an out-of-memory killer does."""
    del engine
    for child in engine_processes():
        os.kill(child.pid, signal.SIGKILL)
