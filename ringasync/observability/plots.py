"""The report's plots: each takes a run's metrics and gives a figure with one plain sentence.

A plot whose data are not there (yet) has no figure; the report says so in its place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from ringasync.observability.run_metrics import Line, RunMetrics, at_ms_of, number

MAX_POINTS = 2000
COMPLETE_ENDS = ("ready", "filtered")
"""Ends at which every sibling has its verdict: the mean reward over these is unbiased."""

_COLOURS = (
    "#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f",
    "#6b7280", "#92400e", "#1e3a8a", "#14532d", "#111827",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plot:
    """``sentence`` says what is seen and how to read it; ``figure`` is None without data."""

    title: str
    sentence: str
    figure: Any


def new_figure(x_title: str, y_title: str, **layout: Any) -> Any:
    """An empty figure in the report's style."""
    figure = go.Figure()
    figure.update_layout(
        template="plotly_white",
        margin={"l": 60, "r": 20, "t": 30, "b": 45},
        height=340,
        colorway=list(_COLOURS),
        legend={"orientation": "h", "y": 1.12, "x": 0},
        hovermode="x unified",
        xaxis_title=x_title,
        yaxis_title=y_title,
    )
    figure.update_layout(**layout)
    return figure


def line_figure(
    x_title: str, y_title: str, series: Mapping[str, tuple[Sequence[Any], Sequence[Any]]]
) -> Any:
    """Lines over a common axis; None when none has a point."""
    filled = {name: (x, y) for name, (x, y) in series.items() if len(x)}
    if not filled:
        return None
    figure = new_figure(x_title, y_title)
    for name, (x, y) in filled.items():
        thin = max(1, len(x) // MAX_POINTS)
        mode = "lines" if len(x) > 1 else "markers"
        figure.add_scatter(x=list(x)[::thin], y=list(y)[::thin], name=name, mode=mode)
    return figure


def of_steps(metrics: RunMetrics, key: str) -> tuple[list[int], list[float]]:
    """A step metric where it has a number: (steps, values)."""
    pairs = [(line["step"], number(line, key)) for line in metrics.steps]
    return [step for step, value in pairs if value is not None], [
        value for _, value in pairs if value is not None
    ]


def step_lines(metrics: RunMetrics, y_title: str, names: Mapping[str, str]) -> Any:
    """Step metrics (key -> label) over learner steps."""
    series = {label: of_steps(metrics, key) for key, label in names.items()}
    return line_figure("learner step", y_title, series)


def group_means(
    metrics: RunMetrics, key: Callable[[Line], str | None], bins: int = 40
) -> dict[str, tuple[list[float], list[float]]]:
    """Mean reward of complete training groups over learner steps, binned, by ``key``."""
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for line in metrics.outcomes:
        name, rewards = key(line), line.get("rewards")
        if line.get("end") in COMPLETE_ENDS and rewards and name is not None:
            mean = sum(rewards) / len(rewards)
            found[name].append((metrics.step_at(at_ms_of(line)), mean))
    last = max((step for points in found.values() for step, _ in points), default=0)
    width = max(1, -(-(last + 1) // bins))
    return {name: _binned(points, width) for name, points in sorted(found.items())}


def _binned(points: Iterable[tuple[int, float]], width: int) -> tuple[list[float], list[float]]:
    sums: dict[int, list[float]] = defaultdict(list)
    for step, value in points:
        sums[step // width].append(value)
    edges = sorted(sums)
    return [(edge + 0.5) * width - 0.5 for edge in edges], [
        sum(sums[edge]) / len(sums[edge]) for edge in edges
    ]


def by_age(metrics: RunMetrics, key: str) -> dict[str, float]:
    """A metric by token age over the whole run, weighted by tokens; ages in rising order."""
    weights: dict[str, float] = defaultdict(float)
    sums: dict[str, float] = defaultdict(float)
    for line in metrics.steps:
        entries = line.get("by_age")
        for age, entry in entries.items() if isinstance(entries, dict) else ():
            value, tokens = number(entry, key), number(entry, "tokens")
            if value is not None and tokens:
                weights[age] += tokens
                sums[age] += tokens * value
    return {age: sums[age] / weights[age] for age in sorted(weights, key=age_order)}


def tokens_by_age(metrics: RunMetrics) -> dict[str, int]:
    """Trained tokens of the whole run by age."""
    counts: dict[str, int] = defaultdict(int)
    for line in metrics.steps:
        entries = line.get("staleness_tokens")
        for age, tokens in entries.items() if isinstance(entries, dict) else ():
            counts[age] += int(tokens)
    return {age: counts[age] for age in sorted(counts, key=age_order)}


def age_order(age: str) -> tuple[int, str]:
    """``2`` before ``10`` before ``16+``."""
    digits = "".join(letter for letter in age if letter.isdigit())
    return (int(digits) if digits else -1, age)


def bar_figure(x_title: str, y_title: str, values: Mapping[str, float], **layout: Any) -> Any:
    """One bar for each entry; None without entries."""
    if not values:
        return None
    figure = new_figure(x_title, y_title, **layout)
    figure.add_bar(x=list(values), y=list(values.values()))
    figure.update_xaxes(type="category")
    return figure
