"""Verifiers: what is right, what is wrong, and what is an error and therefore neither."""

from __future__ import annotations

from typing import Any

import pytest

from ringasync.errors import VerifierError
from ringasync.rewards.pool import VerifierPool
from ringasync.rewards.verifiers import answer_of, verify


@pytest.mark.parametrize(
    ("response", "mark", "answer"),
    [
        ("7-4=3+2=5", "=", "5"),
        ("think </think> 42\n", "</think>", "42"),
        ("no mark here", "=", None),
        ("ends with =", "=", ""),
        (" whole \n", "", "whole"),
        ("", "", ""),
        ("", "=", None),
    ],
)
def test_answer_follows_the_last_mark(response: str, mark: str, answer: str | None) -> None:
    assert answer_of(response, mark) == answer


@pytest.mark.parametrize(
    ("answer", "response", "reward"),
    [
        ("6/3", r"\boxed{2}", 1.0),
        ("2", r"3x=6;\boxed{6/3}", 1.0),
        ("2", r"\boxed{\frac{6}{3}}", 1.0),
        ("-5/3", r"\boxed{-\frac{5}{3}}", 1.0),
        ("-5/3", r"\boxed{5/-3}", 1.0),
        ("0/9", r"\boxed{0}", 1.0),
        ("2", r"\boxed{3} no, \boxed{2}", 1.0),
        ("2", r"\boxed{2} no, \boxed{3}", 0.0),
        ("2", r"\boxed{4/3}", 0.0),
        ("2", r"\boxed{6/0}", 0.0),
        ("2", r"\boxed{", 0.0),
        ("2", r"\boxed{}", 0.0),
        ("2", "", 0.0),
        ("2", "no idea", 0.0),
        ("2", "=-+*/^()[]{}$", 0.0),
        (r"\frac{1}{2}", r"\boxed{0.5}", 1.0),
        (r"x^2+2x+1", r"\boxed{(x+1)^2}", 1.0),
    ],
)
def test_math_verify_judges_values_not_forms(answer: str, response: str, reward: float) -> None:
    assert verify({"verifier": "math_verify", "answer": answer}, response) == reward


@pytest.mark.parametrize(
    ("task", "response", "reward"),
    [
        ({"answer": "yes"}, " yes\n", 1.0),
        ({"answer": "yes"}, "Yes", 0.0),
        ({"answer": 5}, "5", 1.0),
        ({"answer": "5", "answer_mark": "="}, "2+3=5", 1.0),
        ({"answer": "5", "answer_mark": "="}, "5", 0.0),
    ],
)
def test_exact_compares_text(task: dict[str, Any], response: str, reward: float) -> None:
    assert verify({"verifier": "exact", **task}, response) == reward


CHAIN_SUM = {
    "verifier": "reasoning_gym",
    "dataset": "chain_sum",
    "answer_mark": "=",
    "entry": {"question": "", "answer": "5", "metadata": {}},
}


@pytest.mark.parametrize(
    ("response", "reward"),
    [("7-4=3+2=5", 1.0), ("=5", 1.0), ("=4", 0.0), ("5", 0.0), ("", 0.0), ("=", 0.0)],
)
def test_reasoning_gym_scores_what_follows_the_mark(response: str, reward: float) -> None:
    assert verify(CHAIN_SUM, response) == pytest.approx(reward, abs=0.011)


def test_reasoning_gym_may_give_a_part() -> None:
    entry = {"question": "", "answer": "olleh", "metadata": {}}
    task = {"verifier": "reasoning_gym", "dataset": "spell_backward", "entry": entry}
    assert verify(task, "olleh") == 1.0
    assert 0.5 < verify(task, "ollex") < 1.0


@pytest.mark.parametrize(
    ("task", "complaint"),
    [
        ({}, "unknown verifier ''; known: exact"),
        ({"verifier": "guess"}, "unknown verifier 'guess'"),
        ({"verifier": "python:no.such.module:f"}, "cannot be imported"),
        ({"verifier": "python:math:no_such"}, "cannot be imported"),
        ({"verifier": "python:math"}, "cannot be imported"),
        ({"verifier": "python:"}, "cannot be imported"),
        ({"verifier": "python:math:pi"}, "is not a function"),
        ({"verifier": "math_verify", "answer": ""}, "is not mathematics"),
    ],
)
def test_verifier_that_cannot_judge_is_an_error(task: dict[str, Any], complaint: str) -> None:
    with pytest.raises(VerifierError, match=complaint):
        verify(task, r"\boxed{1}")


@pytest.mark.parametrize(
    "task",
    [
        {"verifier": "exact"},
        {"verifier": "reasoning_gym", "dataset": "no_such", "entry": {}},
        {"verifier": "reasoning_gym", "dataset": "chain_sum"},
        {"verifier": "python:tests.rewards.bad_verifiers:raises"},
    ],
)
def test_what_a_verifier_raises_is_no_zero(task: dict[str, Any]) -> None:
    with pytest.raises((KeyError, ValueError)):
        verify(task, "1")


def test_users_own_function_gets_task_and_response() -> None:
    task = {"verifier": "python:tests.rewards.bad_verifiers:good", "answer": "x"}
    assert verify(task, "x") == 0.5


async def test_real_libraries_work_under_the_pools_limits() -> None:
    pool = VerifierPool(1, 30.0, 2 << 30)
    try:
        task = {"verifier": "math_verify", "answer": "6/3"}
        assert await pool.verify(task, r"\boxed{2}") == 1.0
        assert await pool.verify(task, r"\boxed{3}") == 0.0
        assert await pool.verify(CHAIN_SUM, "2+3=5") == 1.0
    finally:
        await pool.close()
