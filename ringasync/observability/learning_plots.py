"""Plots on what the model learns and how far generation and training disagree."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from ringasync.observability.plots import (
    Plot,
    bar_figure,
    by_age,
    group_means,
    new_figure,
    of_steps,
    step_lines,
    tokens_by_age,
)
from ringasync.observability.run_metrics import RunMetrics, number

_ERROR_ENDS = ("grade_error", "quarantined", "purged", "stale", "lost")
_END_COLOURS = {
    "ready": "#059669",
    "filtered": "#9ca3af",
    "stale": "#d97706",
    "purged": "#7c3aed",
    "quarantined": "#be185d",
    "grade_error": "#dc2626",
    "lost": "#111827",
}


def learning_plots(metrics: RunMetrics) -> list[Plot]:
    """All of them, in the order of the report."""
    return [
        _reward(metrics),
        _reward_by_domain(metrics),
        _errors_by_domain(metrics),
        _length(metrics),
        _optimisation(metrics),
        _gap(metrics),
        _mask_rate(metrics),
        _mask_rate_by_age(metrics),
        _drift_by_age(metrics),
        _staleness(metrics),
    ]


def held_out(metrics: RunMetrics) -> list[dict[str, Any]]:
    """Evaluations by learner step: ``step label mean low high n``; no bounds while unfinished."""
    points = []
    for label, line in metrics.eval_lines.items():
        mean, step = number(line, "mean"), number(line, "learner_step")
        interval = line.get("ci95")
        low, high = interval if isinstance(interval, list) and len(interval) == 2 else (None, None)
        if mean is not None:
            point = {"step": step or 0, "label": label, "mean": mean, "low": low, "high": high}
            points.append({**point, "n": line.get("n")})
    known = {point["label"] for point in points}
    for label, rewards in metrics.evals.items():
        graded = [reward for reward in rewards if reward is not None]
        if label not in known and graded:
            step = metrics.steps[-1]["step"] if metrics.steps and label != "first" else 0
            mean = sum(graded) / len(graded)
            point = {"step": step, "label": f"{label} (unfinished)", "mean": mean}
            points.append({**point, "low": None, "high": None, "n": len(graded)})
    return sorted(points, key=lambda point: float(point["step"]))


def _reward(metrics: RunMetrics) -> Plot:
    points = held_out(metrics)
    trained_x, trained_y = of_steps(metrics, "train_reward")
    sampled = group_means(metrics, lambda _: "sampled").get("sampled", ([], []))
    sentence = (
        "Held-out reward is measured on a fixed set of prompts that are never trained on (bars: 95 "
        "% interval). Training reward is the mean over all complete groups; the batch line leaves "
        "out groups whose answers all scored the same, which pulls it towards the middle."
    )
    if not (points or trained_x or sampled[0]):
        return Plot("Reward", sentence, None)
    figure = new_figure("learner step", "mean reward", hovermode="closest")
    figure.add_scatter(x=trained_x, y=trained_y, name="trained batches", mode="lines", opacity=0.35)
    figure.add_scatter(x=sampled[0], y=sampled[1], name="training, all groups", mode="lines")
    if points:
        figure.add_scatter(
            x=[point["step"] for point in points],
            y=[point["mean"] for point in points],
            text=[f"{point['label']}, n = {point['n']}" for point in points],
            error_y={
                "type": "data",
                "array": [_part(point, "high", 1) for point in points],
                "arrayminus": [_part(point, "low", -1) for point in points],
            },
            name="held-out",
            mode="markers+lines",
            marker={"size": 9},
            line={"dash": "dot"},
        )
    return Plot("Reward", sentence, figure)


def _part(point: dict[str, Any], bound: str, sign: int) -> float:
    return 0.0 if point[bound] is None else max(0.0, sign * (point[bound] - point["mean"]))


def _reward_by_domain(metrics: RunMetrics) -> Plot:
    sentence = "Mean reward of all complete training groups, one line for each domain."
    means = group_means(metrics, lambda line: str(line.get("domain", "?")))
    if not means:
        return Plot("Reward by domain", sentence, None)
    figure = new_figure("learner step", "mean reward")
    for domain, (x, y) in means.items():
        figure.add_scatter(x=x, y=y, name=domain, mode="lines+markers")
    return Plot("Reward by domain", sentence, figure)


def _errors_by_domain(metrics: RunMetrics) -> Plot:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for line in metrics.outcomes:
        if line.get("rollout"):  # replaced: its group goes on
            continue
        counts[str(line.get("domain", "?"))][str(line.get("end", "?"))] += 1
    errors = sum(count[end] for count in counts.values() for end in _ERROR_ENDS)
    groups = sum(count.total() for count in counts.values())
    sentence = (
        f"How the {groups} training groups ended, by domain. Ready groups are trained; filtered "
        f"ones had all rewards equal and teach nothing. {errors} ended without use (verifier "
        "errors, quarantined, purged, stale or lost)."
    )
    if not counts:
        return Plot("Ends and errors by domain", sentence, None)
    figure = new_figure("domain", "groups", barmode="stack")
    for end in sorted({end for count in counts.values() for end in count}):
        domains = sorted(counts)
        figure.add_bar(
            x=domains,
            y=[counts[domain][end] for domain in domains],
            name=end,
            marker_color=_END_COLOURS.get(end),
        )
    return Plot("Ends and errors by domain", sentence, figure)


def _length(metrics: RunMetrics) -> Plot:
    figure = step_lines(
        metrics,
        "tokens",
        {"response_length_mean": "mean", "response_length_p95": "95th percentile"},
    )
    sentence = "Length of the trained responses: a mean that falls while the reward rises is fine."
    return Plot("Response length", sentence, figure)


def _optimisation(metrics: RunMetrics) -> Plot:
    figure = step_lines(
        metrics,
        "value",
        {
            "loss": "loss",
            "grad_norm": "gradient norm",
            "ess": "effective sample share",
            "clip_fraction": "clipped share",
            "entropy": "entropy (nats)",
        },
    )
    sentence = (
        "Loss, gradient norm, entropy of the policy, the share of tokens that PPO's clip stopped, "
        "and the effective sample share of the importance weights (1 is best)."
    )
    return Plot("Optimisation", sentence, figure)


def _gap(metrics: RunMetrics) -> Plot:
    figure = step_lines(
        metrics, "nats", {"gap_mean": "mean", "gap_p99": "99th percentile", "gap_max": "maximum"}
    )
    if figure is not None:
        figure.update_yaxes(type="log", exponentformat="power")
    sentence = (
        "How far the inference engine's log-probs are from the learner's, on tokens sampled under "
        "the very weights that are trained (age 0). It is the engines' own disagreement and should "
        "stay flat; a rise here is a fault, not drift."
    )
    return Plot("Log-prob gap at age 0", sentence, figure)


def _mask_rate(metrics: RunMetrics) -> Plot:
    figure = step_lines(
        metrics,
        "share of trained tokens",
        {"mask_rate": "masked", "below_rate": "below the band", "above_rate": "above the band"},
    )
    if figure is not None:
        figure.update_yaxes(tickformat=".2%", rangemode="tozero")
    sentence = (
        "Share of tokens whose gradient IcePop drops because the two engines disagree by more than "
        "the band allows, and on which side."
    )
    return Plot("IcePop mask rate", sentence, figure)


def _mask_rate_by_age(metrics: RunMetrics) -> Plot:
    rates = by_age(metrics, "mask_rate")
    sentence = (
        "The same share over the whole run by token age (learner steps between sampling and "
        "training). Age 0 is engine mismatch alone; what is added at greater ages is policy drift."
    )
    figure = bar_figure("token age (learner steps)", "share masked", rates)
    if figure is not None:
        figure.update_yaxes(tickformat=".2%")
    return Plot("IcePop mask rate by token age", sentence, figure)


def _drift_by_age(metrics: RunMetrics) -> Plot:
    drift = by_age(metrics, "drift")
    sentence = (
        "Mean log ratio of trainer to sampler at an age, minus that at age 0, in nats: how far the "
        "policy has moved since the tokens were sampled."
    )
    return Plot("Drift by token age", sentence, bar_figure("token age", "nats", drift))


def _staleness(metrics: RunMetrics) -> Plot:
    counts = tokens_by_age(metrics)
    total = sum(counts.values())
    sentence = "Trained tokens by age." + (
        f" {_share(counts, total)} of {total:,} trained tokens were of age 0." if total else ""
    )
    figure = bar_figure("token age (learner steps)", "tokens", counts)
    return Plot("Staleness", sentence, figure)


def _share(counts: dict[str, int], total: int) -> str:
    return f"{counts.get('0', 0) / total:.0%}"


def first_and_last(values: Sequence[float]) -> tuple[float, float] | None:
    """Means of the first and the last tenth of a series."""
    if not values:
        return None
    tenth = max(1, len(values) // 10)
    return sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
