r"""Mathematics with exact answers in ``\boxed{}``, scored by math-verify.

The one family so far is ``linear_equation``: terms of one variable and constants on the left, a
constant on the right, the answer a fraction such as ``-6/4``.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from ringasync.config.schema import TaskConfig
from ringasync.errors import ConfigError
from ringasync.tasks.base import Problem, Style, check_verifier, generator

FAMILIES = ("linear_equation",)
_MAX_COEFFICIENT = 12
_KNOWN_PARAMS = ("max_terms", "max_constants", "min_left")


@dataclass(frozen=True, slots=True)
class LinearEquation:
    """Signed coefficients and constants of the left side, and the right side."""

    variable: str
    coefficients: tuple[int, ...]
    constants: tuple[int, ...]
    right: int

    @property
    def answer(self) -> str:
        """The solution as ``numerator/denominator``, not reduced."""
        return f"{self.right - sum(self.constants)}/{sum(self.coefficients)}"

    def question(self) -> str:
        """``3x+2x-4=5``."""
        terms = [f"{c:+d}{self.variable}" for c in self.coefficients]
        terms += [f"{c:+d}" for c in self.constants]
        return "".join(terms).removeprefix("+") + f"={self.right}"

    def worked(self) -> str:
        r"""Both sides as running sums, then the box: ``3+2=5x;5+4=9;\boxed{9/5}``."""
        left = _running(self.coefficients[0], self.coefficients[1:])
        right = _running(self.right, tuple(-c for c in self.constants))
        return f"{left}{self.variable};{right};{self.short()}"

    def short(self) -> str:
        """The box alone."""
        return rf"\boxed{{{self.answer}}}"


class MathematicsSource:
    """Endless equations from (seed, index).

    ``max_terms`` terms of the variable and ``max_constants`` constants at most, ``min_left`` of
    both together at least: with two the answer straight off is as easy as the steps.

    Raises:
        ConfigError: unknown family or params.
    """

    size: int | None = None

    def __init__(self, task: TaskConfig, seed: int) -> None:
        family = task.dataset or FAMILIES[0]
        if family not in FAMILIES:
            raise ConfigError(
                f"data.tasks {task.name!r}: mathematics knows {', '.join(FAMILIES)}, not {family!r}"
            )
        unknown = sorted(set(task.params) - set(_KNOWN_PARAMS))
        if unknown:
            raise ConfigError(
                f"data.tasks {task.name!r}: unknown params {unknown}; "
                f"known: {', '.join(_KNOWN_PARAMS)}"
            )
        self.name = task.name
        self._verifier = check_verifier(task, "math_verify")
        self._seed = seed
        max_terms, max_constants = _count(task, "max_terms"), _count(task, "max_constants")
        min_left = _count(task, "min_left")
        self._shapes = [
            (terms, constants)
            for terms in range(1, max_terms + 1)
            for constants in range(1, max_constants + 1)
            if terms + constants >= min_left
        ]
        if not self._shapes:
            raise ConfigError(
                f"data.tasks {task.name!r}: params.min_left = {min_left} must be at most "
                f"max_terms + max_constants = {max_terms + max_constants}"
            )

    def problem(self, index: int) -> Problem:
        """The equation at ``index``; the verifier needs its answer only."""
        equation = self.equation(index)
        task = {"verifier": self._verifier, "answer": equation.answer}
        return Problem(equation.question(), self.name, task, "mathematics/linear_equation", index)

    def solution(self, index: int, style: Style) -> str | None:
        """A correct response in this style."""
        equation = self.equation(index)
        return equation.worked() if style == "worked" else equation.short()

    def equation(self, index: int) -> LinearEquation:
        """The equation at ``index``."""
        draw = generator(self._seed, self.name, index)
        variable = draw.choice("xyz")
        num_terms, num_constants = draw.choice(self._shapes)
        while True:
            first = draw.randint(1, 9)
            others = _signed(draw, num_terms - 1)
            if 2 <= first + sum(others) <= _MAX_COEFFICIENT:
                break
        constants = _signed(draw, num_constants)
        return LinearEquation(variable, (first, *others), constants, draw.randint(0, 9))


def _count(task: TaskConfig, key: str) -> int:
    value = task.params.get(key, 2)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 9:
        raise ConfigError(
            f"data.tasks {task.name!r}: params.{key} = {value!r} must be a whole number, 1 to 9"
        )
    return value


def _signed(draw: Random, count: int) -> tuple[int, ...]:
    return tuple(draw.choice((-1, 1)) * draw.randint(1, 9) for _ in range(count))


def _running(first: int, rest: tuple[int, ...]) -> str:
    total, text = first, str(first)
    for term in rest:
        total += term
        text += f"{term:+d}={total}"
    return text
