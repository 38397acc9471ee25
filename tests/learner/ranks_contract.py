"""What engines on two ranks are asked for, whichever they are."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from torch import Tensor

from learner.backends.base import Backend
from ringasync.config.schema import LearnerConfig, LossConfig

from .backend_contract import BackendContract, learner_config
from .ranks_kit import TwoRanks, spec_of

DENSE_TERMS: dict[str, Any] = {"kl_coef": 0.1, "entropy_coef": 0.01, "normalizer": "sequence"}
ROUTERS: dict[str, Any] = {
    "model": "moe",
    "count": 5,
    "learner": {"microbatch_tokens": 1, "freeze_router": "none"},
    "loss": {"router_balance_coef": 0.1, "router_z_coef": 0.1},
}
"""A case of an engine's numbers: model, sequences, settings."""


class ContractOnTwoRanks(BackendContract):
    """The contract, on the module's fixture ``ranks``; ``engine``: settings of the learner."""

    ranks: ClassVar[TwoRanks]
    engine: ClassVar[dict[str, object]] = {}

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _on(cls, ranks: TwoRanks) -> None:
        cls.ranks = ranks

    def make(
        self,
        learner: LearnerConfig | None = None,
        loss: LossConfig | None = None,
        *,
        temperature: float = 1.0,
    ) -> Backend:
        learner = (learner or learner_config()).model_copy(update=self.engine)
        return self.ranks.make(spec_of(learner, loss, temperature=temperature))


def close(found: Tensor, expected: Tensor, relative: float) -> None:
    """Within ``relative`` of the largest value: one near zero is a difference of large ones."""
    scale = float(expected.abs().max())
    assert float((found.cpu() - expected.cpu()).abs().max()) <= relative * scale
