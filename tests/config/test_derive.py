"""Figures that follow from the settings, against sums done by hand."""

from __future__ import annotations

from ringasync.config.derive import (
    derive,
    longest_group_tokens,
    min_groups_a_step,
    open_tokens_bound,
    prompt_room_tokens,
    regenerated_tokens_bound,
)
from ringasync.config.schema import (
    BudgetConfig,
    Config,
    DataConfig,
    EvalConfig,
    LearnerConfig,
    LossConfig,
    ModelConfig,
    SamplingConfig,
    ScheduleConfig,
    TaskConfig,
    WorkerConfig,
)

DATA = DataConfig(tasks=(TaskConfig(name="sums", kind="mathematics"),))


def config(schedule: ScheduleConfig, every_steps: int = 0) -> Config:
    return Config(
        data=DATA,
        model=ModelConfig(max_model_len_tokens=128),
        sampling=SamplingConfig(max_new_tokens=100),
        worker=WorkerConfig(count=3, max_concurrent=16, flush_tokens=32),
        learner=LearnerConfig(steps=10, updates_per_batch=2),
        eval=EvalConfig(prompts=256, every_steps=every_steps),
        schedule=schedule,
    )


PIPELINED = ScheduleConfig(group_size=4, budget=BudgetConfig(tokens=1000), max_staleness=3)
ROUNDS = ScheduleConfig(
    mode="rounds", group_size=4, budget=BudgetConfig(tokens=1000), pool_capacity=20
)


def test_figures_of_a_pipelined_run() -> None:
    it = config(PIPELINED)
    assert prompt_room_tokens(it) == 28
    assert longest_group_tokens(it) == 400
    assert min_groups_a_step(it) == 3
    assert open_tokens_bound(it) == 4000
    assert regenerated_tokens_bound(it) == 64


def test_open_tokens_of_rounds_follow_from_the_pool() -> None:
    assert open_tokens_bound(config(ROUNDS)) == 20 * 100 + 1000 + 400


def test_list_shows_value_and_sum() -> None:
    shown = {each.name: (each.value, each.formula) for each in derive(config(PIPELINED))}
    assert shown["open tokens, at most"] == ("4000 tokens", "(max_staleness 3 + 1) x Phi 1000")
    assert shown["tokens trained in the whole run"][0] == "10000 tokens"
    assert shown["optimizer updates"][0] == "20"
    assert shown["rollouts generated at once"][0] == "48"


def test_held_out_rollouts_count_every_evaluation() -> None:
    figures = {each.name: each.value for each in derive(config(PIPELINED, every_steps=3))}
    # before the first step, after steps 3, 6 and 9, and after the last
    assert figures["held-out rollouts"] == str(5 * 256)


def test_a_reference_policy_is_counted_only_where_there_is_one() -> None:
    plain = config(PIPELINED)
    held = plain.model_copy(update={"loss": LossConfig(kl_coef=1e-3)})
    added = {one.name for one in derive(held)} - {one.name for one in derive(plain)}
    assert added == {"reference policy, memory of the learner's device"}
