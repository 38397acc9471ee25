"""Settings of DeepSpeed: what is refused, what may change on resume, what the arithmetic says."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from ringasync.config.arithmetic import zero_stage
from ringasync.config.load import config_hash
from ringasync.config.schema import Config


def config(**changes: dict[str, Any]) -> Config:
    return Config.model_validate(
        {"data": {"tasks": [{"name": "sums", "kind": "mathematics"}]}, **changes}
    )


def deepspeed(**changes: Any) -> dict[str, Any]:
    return {"backend": "deepspeed", **changes}


@pytest.mark.parametrize(
    ("changes", "rule", "remedy"),
    [
        (
            {"learner": {"zero_stage": 0}},
            "learner.zero_stage = 0 is for learner.backend = 'deepspeed', not 'torch'",
            "leave learner.zero_stage out",
        ),
        (
            {"learner": {"offload_optimizer": True}},
            "learner.offload_optimizer = true is for learner.backend = 'deepspeed', not 'torch'",
            "set the backend",
        ),
        (
            {"learner": deepspeed(zero_stage=0, offload_optimizer=True)},
            "learner.offload_optimizer = true needs learner.zero_stage 1, 2 or 3",
            "raise the stage",
        ),
        (
            {"learner": deepspeed(), "schedule": {"mode": "rounds", "colocated": True}},
            "learner.backend = 'deepspeed' cannot go with schedule.colocated = true",
            "set learner.backend = 'torch'",
        ),
        (
            {"learner": deepspeed(compile=True, zero_stage=3)},
            "learner.compile = true cannot go with learner.zero_stage = 3",
            "set learner.compile = false",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    changes: dict[str, dict[str, Any]], rule: str, remedy: str
) -> None:
    with pytest.raises(ValidationError) as refused:
        config(**changes)
    assert rule in str(refused.value)
    assert remedy in str(refused.value)


@pytest.mark.parametrize("stage", [-1, 4])
def test_there_are_four_stages(stage: int) -> None:
    with pytest.raises(ValidationError, match="zero_stage"):
        config(learner=deepspeed(zero_stage=stage))


def test_stage_offload_and_backend_may_change_between_two_lives() -> None:
    kinds = [{}, deepspeed(), deepspeed(zero_stage=3), deepspeed(offload_optimizer=True)]
    assert len({config_hash(config(learner=kind)) for kind in kinds}) == 1


def test_the_arithmetic_knows_the_stage() -> None:
    assert zero_stage(config(learner=deepspeed(ranks=4))) == 1
    assert zero_stage(config(learner=deepspeed(ranks=4, zero_stage=2))) == 2
    assert zero_stage(config(learner={"ranks": 4})) == 3
