"""Learning curves of finished runs, side by side: a table, the curves as JSON, one picture.

python -m benchmarks.learning_curves runs/seed1 runs/seed2 runs/control --out docs/results/demo
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.machine import machine
from ringasync.coordinator.metrics_file import METRICS_FILE, read_lines

SMOOTH_STEPS = 5


@dataclass(frozen=True, slots=True)
class Curve:
    """One run: reward of its trained batches by step, its evaluations and its summary."""

    name: str
    steps: list[int]
    train_reward: list[float]
    evals: list[dict[str, Any]]
    summary: dict[str, Any]


def read_curve(run_dir: Path) -> Curve:
    """Read a finished run's ``metrics.jsonl`` and ``summary.json``."""
    lines = list(read_lines(run_dir / METRICS_FILE))
    steps = [line for line in lines if line["kind"] == "step" and not line.get("replayed")]
    return Curve(
        run_dir.name,
        [int(line["step"]) for line in steps],
        [float(line["train_reward"]) for line in steps],
        [
            {key: line[key] for key in ("label", "learner_step", "mean", "ci95", "n", "by_domain")}
            for line in lines
            if line["kind"] == "eval"
        ],
        json.loads((run_dir / "summary.json").read_text(encoding="utf-8")),
    )


def smooth(values: Sequence[float], width: int = SMOOTH_STEPS) -> list[float]:
    """Mean of each value and up to ``width - 1`` before it."""
    return [
        sum(values[max(0, i + 1 - width) : i + 1]) / min(width, i + 1) for i in range(len(values))
    ]


def table(curves: Sequence[Curve]) -> str:
    """Markdown: a row a run."""
    rows = [
        "| run | held-out before | held-out after | training first/last tenth | steps "
        "| tokens accepted | tokens trained | mask rate | ledger | wall s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for curve in curves:
        s = curve.summary
        ends = [_with_interval(one) for one in (curve.evals[0], curve.evals[-1])]
        rows.append(
            f"| {curve.name} | {ends[0]} | {ends[1]} "
            f"| {s['train_reward_first']:.3f} / {s['train_reward_last']:.3f} | {s['steps']} "
            f"| {s['tokens_accepted']} | {s['tokens_trained']} | {s['mask_rate_mean']:.4f} "
            f"| {'balanced' if s['ledger_balanced'] else 'OUT OF BALANCE'} | {s['wall_s']:.0f} |"
        )
    return "\n".join(rows)


def _with_interval(one: dict[str, Any]) -> str:
    low, high = one["ci95"]
    return f"{one['mean']:.3f} [{low:.3f}, {high:.3f}]"


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Training reward as lines, evaluations as points with their 95 % intervals; an SVG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for curve in curves:
        (line,) = axes.plot(curve.steps, smooth(curve.train_reward), label=curve.name)
        for one in curve.evals:
            below, above = one["mean"] - one["ci95"][0], one["ci95"][1] - one["mean"]
            axes.errorbar(
                one["learner_step"],
                one["mean"],
                yerr=[[below], [above]],
                fmt="o",
                color=line.get_color(),
                capsize=3,
            )
    axes.set_xlabel("learner step")
    axes.set_ylabel(f"reward (lines: trained batches, mean of {SMOOTH_STEPS}; dots: held-out)")
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")],
    out: Annotated[Path, typer.Option(help="Path without ending: .md, .json and .svg are made.")],
    command: Annotated[str, typer.Option(help="The command that made the runs.")] = "make demo",
) -> None:
    """Write the table, the curves and the picture."""
    curves = [read_curve(run) for run in runs]
    out.parent.mkdir(parents=True, exist_ok=True)
    data = {
        "command": command,
        "machine": machine(),
        "runs": [
            {
                "name": curve.name,
                "steps": curve.steps,
                "train_reward": [round(value, 5) for value in curve.train_reward],
                "evals": curve.evals,
                "summary": curve.summary,
            }
            for curve in curves
        ],
    }
    out.with_suffix(".json").write_text(json.dumps(data, default=str) + "\n", encoding="utf-8")
    draw(curves, out.with_suffix(".svg"))
    host = ", ".join(f"{key} {value}" for key, value in machine().items())
    out.with_suffix(".md").write_text(
        f"# Learning curves\n\nCommand: `{command}`\n\nMachine: {host}\n\n{table(curves)}\n\n"
        f"![reward by step]({out.with_suffix('.svg').name})\n",
        encoding="utf-8",
    )
    typer.echo(table(curves))


if __name__ == "__main__":
    typer.run(main)
