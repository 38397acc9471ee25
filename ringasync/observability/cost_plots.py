"""Plots on where tokens and time go."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from ringasync.observability.plots import (
    MAX_POINTS,
    Plot,
    line_figure,
    new_figure,
    of_steps,
    step_lines,
)
from ringasync.observability.run_metrics import Line, RunMetrics, number
from ringasync.records.states import Account

_TIMES = ("wait", "handover", "assemble", "journal", "train", "checkpoint", "publish")
_BUSY_WORDS = 3


def cost_plots(metrics: RunMetrics) -> list[Plot]:
    """All of them, in the order of the report."""
    return [
        _budget_fill(metrics),
        _accounts(metrics),
        _learner_time(metrics),
        _role_time(metrics),
        _throughput(metrics),
        *_utilization(metrics),
        _queues(metrics),
    ]


def _budget_fill(metrics: RunMetrics) -> Plot:
    _, fills = of_steps(metrics, "budget_fill")
    sentence = "Trained tokens of a batch over the budget Phi; 1 means that batches are full." + (
        f" The mean is {sum(fills) / len(fills):.3f}." if fills else ""
    )
    figure = step_lines(metrics, "trained tokens / Phi", {"budget_fill": "budget fill"})
    if figure is not None:
        figure.update_yaxes(rangemode="tozero")
    return Plot("Budget fill", sentence, figure)


def _accounts(metrics: RunMetrics) -> Plot:
    lines = [line for line in metrics.snapshots if isinstance(line.get("ledger"), dict)]
    lines = lines[:: max(1, len(lines) // MAX_POINTS)]
    sentence = (
        "Every token that a worker delivered is in exactly one account; the height of the stack is "
        "all that was accepted."
    )
    if not lines:
        return Plot("Tokens by account", sentence, None)
    figure = new_figure("seconds since the start", "tokens")
    times = [number(line, "t_s") for line in lines]
    for account in Account:
        tokens = [int(line["ledger"].get(account.value, 0)) for line in lines]
        if any(tokens):
            figure.add_scatter(
                x=times,
                y=tokens,
                name=account.value,
                mode="lines",
                line={"width": 0.5},
                stackgroup="one",
            )
    return Plot("Tokens by account", sentence, figure)


def _learner_time(metrics: RunMetrics) -> Plot:
    columns = {name: of_steps(metrics, f"time_{name}_s") for name in _TIMES}
    totals = {name: sum(values) for name, (_, values) in columns.items()}
    whole = sum(totals.values())
    sentence = "What the learner's time went to in each step."
    if whole:
        shares = ", ".join(f"{name} {total / whole:.0%}" for name, total in totals.items() if total)
        sentence += f" Over the run: {shares}."
    if not any(steps for steps, _ in columns.values()):
        return Plot("Learner's time", sentence, None)
    figure = new_figure("learner step", "seconds", barmode="stack", bargap=0)
    for name, (steps, values) in columns.items():
        if any(values):
            thin = max(1, len(steps) // MAX_POINTS)
            figure.add_bar(x=steps[::thin], y=values[::thin], name=name)
    return Plot("Learner's time", sentence, figure)


def busy_shares(metrics: RunMetrics) -> dict[str, dict[str, float]]:
    """For each role, the share of its sightings in snapshots by what it was doing."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for line in metrics.snapshots:
        for row in line.get("workers") or ():
            counts[str(row.get("role", "?"))][activity(row)] += 1
    return {
        role: {doing: count / found.total() for doing, count in found.most_common()}
        for role, found in sorted(counts.items())
    }


def activity(row: Line) -> str:
    """What a session was doing without the numbers in it, so that the same things count as one."""
    if row.get("state") == "late":
        return "late heartbeat"
    said = str(row.get("doing") or "not said").split("(")[0].split(":")[0]
    words = [word for word in said.split() if not any(letter.isdigit() for letter in word)]
    return " ".join(words[:_BUSY_WORDS]) or "not said"


def _role_time(metrics: RunMetrics) -> Plot:
    shares = busy_shares(metrics)
    sentence = "What each role was seen doing in the snapshots (one every two seconds)."
    worker = shares.get("worker", {})
    if worker:
        sentence += f" Workers were generating {worker.get('generating', 0):.0%} of the time."
    if not shares:
        return Plot("Time by role", sentence, None)
    figure = new_figure("share of sightings", "", barmode="stack", hovermode="closest")
    for doing in sorted({doing for found in shares.values() for doing in found}):
        figure.add_bar(
            y=list(shares),
            x=[found.get(doing, 0) for found in shares.values()],
            name=doing,
            orientation="h",
        )
    figure.update_layout(yaxis={"type": "category"}, xaxis={"tickformat": ".0%", "range": [0, 1]})
    return Plot("Time by role", sentence, figure)


def generation_rate(metrics: RunMetrics) -> tuple[list[float], list[float]]:
    """(seconds, tokens/s): accepted tokens between snapshots at least five seconds apart."""
    times: list[float] = []
    rates: list[float] = []
    before: tuple[float, float] | None = None
    for line in metrics.snapshots:
        at_s, ledger = number(line, "t_s"), line.get("ledger")
        accepted = number(ledger, "accepted") if isinstance(ledger, dict) else None
        if at_s is None or accepted is None:
            continue
        if before is None:
            before = (at_s, accepted)
        elif at_s - before[0] >= 5:
            times.append(at_s)
            rates.append(max(0.0, accepted - before[1]) / (at_s - before[0]))
            before = (at_s, accepted)
    return times, rates


def _throughput(metrics: RunMetrics) -> Plot:
    generated = generation_rate(metrics)
    first_ms = metrics.step_times_ms[0] if metrics.step_times_ms else 0
    start_ms = next((line["at_ms"] for line in metrics.events if _is_start(line)), first_ms)
    trained: dict[float, float] = {}
    for line, at_ms in zip(metrics.steps, metrics.step_times_ms, strict=True):
        rate = number(line, "tokens_per_s")
        if rate is not None:
            trained[(at_ms - start_ms) / 1000] = rate
    series: dict[str, tuple[Any, Any]] = {
        "generation (accepted)": generated,
        "training (trained tokens / step time)": (list(trained), list(trained.values())),
    }
    sentence = (
        "Tokens a second over time. Training can be no faster than generation for long; the "
        "learner's waiting shows above as time." + _prefills(metrics.summary)
    )
    return Plot("Throughput", sentence, line_figure("seconds since the start", "tokens/s", series))


def _utilization(metrics: RunMetrics) -> list[Plot]:
    """One plot, or none where no step has ``mfu``: on a CPU nobody misses it."""
    _, values = of_steps(metrics, "mfu")
    if not values:
        return []
    sentence = (
        "MFU: the model's floating-point work over what the learner's device could do while it "
        f"trained. Mean {sum(values) / len(values):.1%}."
    )
    return [Plot("Learner's utilization", sentence, step_lines(metrics, "share", {"mfu": "MFU"}))]


def _prefills(summary: Line) -> str:
    """What contexts cost beside the tokens: siblings and resumed partials compute them anew."""
    per_token, given = number(summary, "prefilled_per_trained_token"), summary.get("prompt_tokens")
    if per_token is None or not given:
        return ""
    cached = (number(summary, "prompt_tokens_cached") or 0.0) / float(given)
    return (
        f" For every trained token {per_token:.2f} tokens of context were prefilled when requests "
        f"began; the prefix cache had {cached:.0%} of all."
    )


def _is_start(line: Line) -> bool:
    return line.get("kind") == "start" and isinstance(line.get("at_ms"), int)


def _queues(metrics: RunMetrics) -> Plot:
    names = {
        "open_rollouts": "open rollouts",
        "running_rollouts": "being generated",
        "queued_tickets": "waiting tickets",
        "grading_jobs": "being graded",
        "ready_groups": "ready groups",
    }
    series: dict[str, tuple[list[Any], list[Any]]] = {label: ([], []) for label in names.values()}
    for line in metrics.snapshots:
        at_s, queues = number(line, "t_s"), line.get("queues")
        for name, label in names.items():
            value = number(queues, name) if isinstance(queues, dict) else None
            if at_s is not None and value is not None:
                series[label][0].append(at_s)
                series[label][1].append(value)
    sentence = "Work that lies between the roles: a queue that only grows has a slow reader."
    return Plot("Queues", sentence, line_figure("seconds since the start", "count", series))
