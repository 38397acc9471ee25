"""What is asked of DeepSpeed beside the contract: the numbers of the torch engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from learner.backends.torch_backend import TorchBackend
from ringasync.config.schema import LossConfig

from .backend_contract import learner_config
from .checkpoint_kit import snapshot
from .kit import toy_batch
from .ranked_learner import CANCELLED
from .ranks_contract import DENSE_TERMS, ROUTERS, close
from .ranks_kit import build, keep_gradients, spec_of

STAGES = (0, 1, 2, 3)
ON_GPU = torch.cuda.is_available()
RELATIVE = 1e-4 if ON_GPU else 1e-5
"""A GPU adds in no fixed order."""

CASES: dict[str, dict[str, Any]] = {
    "one micro-batch": {"learner": {"microbatch_tokens": 9999}},
    "odd number of micro-batches": {"learner": {"microbatch_tokens": 1}, "count": 5},
    "accumulation, clipping, two updates": {
        "count": 9,
        "learner": {"microbatch_tokens": 48, "grad_clip": 0.05, "updates_per_batch": 2},
    },
    "untied, all logits at once": {"model": "untied", "learner": {"logprob_chunk_tokens": 0}},
    "chunks and layers computed again": {
        "learner": {
            "logprob_chunk_tokens": 4,
            "microbatch_tokens": 48,
            "activation_checkpointing": True,
        },
    },
    "padded, with all dense terms": {
        "learner": {"microbatch_tokens": 48, "packing": "off"},
        "loss": DENSE_TERMS,
    },
    "routers": ROUTERS,
    "frozen routers": {"model": "moe", "learner": {"freeze_router": "all"}},
}


def zero(stage: int, **changes: object) -> dict[str, object]:
    """Settings of a learner on DeepSpeed."""
    return {"backend": "deepspeed", "zero_stage": stage, **changes}


def agrees_with_torch(
    case: dict[str, Any],
    stage: int,
    make: Callable[[dict[str, Any]], tuple[Any, TorchBackend]],
    **changes: object,
) -> None:
    """Losses, gradients and what they lead to are those of one rank with torch.

    ``make`` gives the engine, and rank 0's part of it, which keeps its gradients.
    """
    settings = {"weight_decay": 0.1, "adam_eps": 1e-4, **case["learner"]}
    rest: dict[str, Any] = {
        "loss": LossConfig.model_validate(case.get("loss", {})),
        "temperature": 0.8,
        "model": case.get("model", "tied"),
    }
    whole = settings if case.get("model") == "moe" else {**settings, "microbatch_tokens": 9999}
    alone = build(spec_of(learner_config(**{**whole, "compile": False}), **rest))
    engine, local = make(spec_of(learner_config(**settings, **zero(stage, **changes)), **rest))
    assert local._scores.chunk_tokens == alone._scores.chunk_tokens
    expected_gradients, gradients = keep_gradients(alone), keep_gradients(local)
    for step in range(2):
        batch = toy_batch(case.get("count", 6), step=step)
        expected, found = alone.train_batch(batch), engine.train_batch(batch)
        assert found.loss == pytest.approx(expected.loss, rel=RELATIVE, abs=CANCELLED)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=RELATIVE)
        assert found.terms == pytest.approx(expected.terms, rel=RELATIVE, abs=CANCELLED)
        assert found.tokens.num_tokens == expected.tokens.num_tokens == batch.trained_tokens
    trained = {name for name, one in alone.model.named_parameters() if one.requires_grad}
    assert gradients.keys() == expected_gradients.keys() == trained
    for name, gradient in expected_gradients.items():
        close(gradients[name], gradient, RELATIVE)
    one, two = snapshot(alone), snapshot(engine)
    assert one.keys() == two.keys()
    for name in one:
        if name.startswith(("model.", "optim.")):
            close(two[name], one[name], RELATIVE)
