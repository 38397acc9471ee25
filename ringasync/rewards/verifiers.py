"""Verifiers: ``verify(task, response) -> float``. Run in the child processes of ``pool``.

An exception here is an error of the verifier, retried and then ``grade_error``: never a zero.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

from ringasync.errors import VerifierError

Verifier = Callable[[dict[str, Any], str], float]


def verify(task: dict[str, Any], response: str) -> float:
    """Score ``response`` by the verifier that ``task["verifier"]`` names.

    Known names: ``reasoning_gym``, ``math_verify``, ``exact``, and for a user's own function
    ``(task, response) -> float`` its import path, ``python:package.module:function``.
    """
    name = str(task.get("verifier", ""))
    if name.startswith("python:"):
        # As it is: the child refuses what is no finite number, and says what it was.
        return _user_function(name)(task, response)
    try:
        verifier = VERIFIERS[name]
    except KeyError:
        known = ", ".join([*VERIFIERS, "python:package.module:function"])
        raise VerifierError(f"unknown verifier {name!r}; known: {known}") from None
    return float(verifier(task, response))


def answer_of(response: str, mark: str) -> str | None:
    """What follows the last ``mark``; the whole response without a mark; None if it is missing."""
    if not mark:
        return response.strip()
    _, found, answer = response.rpartition(mark)
    return answer.strip() if found else None


def exact(task: dict[str, Any], response: str) -> float:
    """1 when the answer equals ``task["answer"]`` as text, else 0."""
    answer = answer_of(response, str(task.get("answer_mark", "")))
    return float(answer == str(task["answer"]).strip())


def reasoning_gym(task: dict[str, Any], response: str) -> float:
    """The library's own score of the answer, in [0, 1]; no answer at all scores as it says."""
    answer = answer_of(response, str(task.get("answer_mark", "")))
    params = json.dumps(task.get("params", {}), sort_keys=True)
    dataset = _gym_dataset(str(task["dataset"]), params, int(task.get("seed", 0)))
    # Entries that JSON would change are not stored but drawn again.
    entry = task["entry"] if "entry" in task else dataset[int(task["row"])]
    return float(dataset.score_answer(answer=answer, entry=entry))


def math_verify(task: dict[str, Any], response: str) -> float:
    r"""1 when math-verify finds the response equal to ``task["answer"]``, else 0.

    With a ``\boxed{}`` in the response only the last one counts.
    """
    return _math_verdict(str(task["answer"]), _last_box(response) or response)


VERIFIERS: dict[str, Verifier] = {
    "exact": exact,
    "reasoning_gym": reasoning_gym,
    "math_verify": math_verify,
}


@lru_cache(maxsize=32)
def _gym_dataset(name: str, params: str, seed: int) -> Any:
    """Building one reads files, and some verifiers look at their dataset's params."""
    from reasoning_gym import create_dataset

    return create_dataset(name, seed=seed, **json.loads(params))


@lru_cache(maxsize=8192)
def _math_verdict(gold: str, text: str) -> float:
    """Cached: short answers recur, and parsing one costs milliseconds."""
    from math_verify import parse
    from math_verify import verify as equal

    # The pool kills at the time limit; math-verify's own would need signals of this process.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    expected = parse(rf"\boxed{{{gold}}}", parsing_timeout=None, raise_on_error=True)
    if not expected:
        raise VerifierError(f"the reference answer {gold!r} is not mathematics")
    return float(equal(expected, parse(text, parsing_timeout=None), timeout_seconds=None))


def _last_box(response: str) -> str:
    r"""The last ``\boxed{...}`` with balanced braces, or nothing."""
    start = response.rfind(r"\boxed{")
    if start < 0:
        return ""
    depth = 0
    for end in range(start, len(response)):
        depth += {"{": 1, "}": -1}.get(response[end], 0)
        if depth == 0 and response[end] == "}":
            return response[start : end + 1]
    return ""


@cache
def _user_function(name: str) -> Verifier:
    module_name, _, function_name = name.removeprefix("python:").partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise VerifierError(
            f"verifier {name!r} cannot be imported: {error}; it must be on the Python path of "
            "the workers"
        ) from error
    if not callable(function):
        raise VerifierError(f"verifier {name!r} is not a function")
    found: Verifier = function
    return found
