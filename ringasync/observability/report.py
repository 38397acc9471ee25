"""``report.html``: one file that shows a whole run, readable without a network."""

from __future__ import annotations

import html
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plotly.io as pio
from plotly.offline import get_plotlyjs

from ringasync.observability.cost_plots import cost_plots
from ringasync.observability.learning_plots import first_and_last, held_out, learning_plots
from ringasync.observability.plain import duration, human
from ringasync.observability.plots import Plot, of_steps
from ringasync.observability.run_metrics import RunMetrics, number, read_run

REPORT_FILE = "report.html"

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #111827; margin: 0 auto; max-width: 1080px;
  padding: 24px; background: #fff; }
h1 { margin: 0 0 4px; font-size: 26px; } h2 { margin: 36px 0 4px; font-size: 19px; }
p { margin: 4px 0 8px; max-width: 78ch; } .dim { color: #6b7280; }
.notice { border-left: 4px solid #d97706; background: #fffbeb; padding: 8px 12px; margin: 12px 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 12px;
  margin: 18px 0; }
.tile { border: 1px solid #e5e7eb; border-radius: 8px; padding: 10px 14px; }
.tile b { display: block; font-size: 20px; } .tile span { color: #6b7280; font-size: 13px; }
.none { border: 1px dashed #d1d5db; border-radius: 8px; padding: 18px; color: #6b7280; }
nav a { margin-right: 12px; color: #2563eb; text-decoration: none; white-space: nowrap; }
"""


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` from what ``run_dir`` holds; returns its path.

    Needs nothing but the folder: a run that goes on, was killed or never made a step gives a
    report that says so. The file is replaced whole.
    """
    metrics = read_run(run_dir)
    plots = learning_plots(metrics) + cost_plots(metrics)
    path = run_dir / REPORT_FILE
    run_dir.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{REPORT_FILE}.{os.getpid()}")
    temporary.write_text(_page(run_dir.resolve().name, metrics, plots), encoding="utf-8")
    temporary.replace(path)
    return path


def _page(run: str, metrics: RunMetrics, plots: list[Plot]) -> str:
    title = html.escape(run)
    written = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    links = " ".join(f'<a href="#{_anchor(plot)}">{html.escape(plot.title)}</a>' for plot in plots)
    body = "\n".join(_section(plot) for plot in plots)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{_STYLE}</style>
<script>{get_plotlyjs()}</script></head>
<body><h1>{title}</h1><p class="dim">written {written}</p>
{_notices(metrics)}
<div class="tiles">{"".join(_tile(name, value, note) for name, value, note in tiles(metrics))}</div>
<nav>{links}</nav>
{body}
{_summary_table(metrics)}
</body></html>
"""


def _section(plot: Plot) -> str:
    if plot.figure is None:
        shown = '<div class="none">no data yet</div>'
    else:
        shown = pio.to_html(
            plot.figure,
            full_html=False,
            include_plotlyjs=False,
            config={"displayModeBar": False, "responsive": True},
        )
    heading = f'<h2 id="{_anchor(plot)}">{html.escape(plot.title)}</h2>'
    return f"{heading}<p>{html.escape(plot.sentence)}</p>{shown}"


def _anchor(plot: Plot) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in plot.title.lower())


def _notices(metrics: RunMetrics) -> str:
    notices = []
    if not metrics.summary:
        notices.append(
            "This run is not finished: it goes on, or was stopped. What is shown is up to now."
        )
    if not metrics.steps:
        notices.append("The learner has made no step yet.")
    if metrics.unreadable_lines:
        notices.append(f"{metrics.unreadable_lines} lines of metrics.jsonl could not be read.")
    if metrics.summary.get("ledger_balanced") is False:
        notices.append("The ledger is OUT OF BALANCE: run `ringasync audit`.")
    return "".join(f'<div class="notice">{html.escape(text)}</div>' for text in notices)


def tiles(metrics: RunMetrics) -> Iterator[tuple[str, str, str]]:
    """Headline numbers: (name, value, note). What is not known is left out."""
    yield from _reward_tiles(metrics)
    steps = number(metrics.summary, "steps") or len(metrics.steps)
    versions = metrics.summary.get("policy_versions")
    yield "learner steps", f"{steps:.0f}", f"{versions} policy versions" if versions else ""
    yield from _token_tiles(metrics)
    _, masks = of_steps(metrics, "mask_rate")
    if masks:
        yield "IcePop mask rate", f"{sum(masks) / len(masks):.3%}", "mean over steps"
    _, gaps = of_steps(metrics, "gap_mean")
    if gaps:
        yield "log-prob gap", f"{sum(gaps) / len(gaps):.2e} nats", "mean at age 0"
    wall_s = number(metrics.summary, "wall_s")
    if wall_s is None and metrics.snapshots:
        wall_s = number(metrics.snapshots[-1], "t_s")
    if wall_s is not None:
        yield "time", duration(wall_s), "from start to end"


def _reward_tiles(metrics: RunMetrics) -> Iterator[tuple[str, str, str]]:
    points = [point for point in held_out(metrics) if point["low"] is not None]
    if points:
        first, last = points[0], points[-1]
        value = f"{first['mean']:.3f}"
        if last is not first:
            value += f" → {last['mean']:.3f}"
        note = f"95 %: {last['low']:.3f} to {last['high']:.3f}, n = {last['n']}"
        yield "held-out reward", value, note
    before, after = (number(metrics.summary, f"train_reward_{end}") for end in ("first", "last"))
    note = "all groups, first and last tenth"
    if before is None or after is None:
        ends = first_and_last(of_steps(metrics, "train_reward")[1])
        if ends is None:
            return
        (before, after), note = ends, "trained batches, first and last tenth"
    yield "training reward", f"{before:.3f} → {after:.3f}", note


def _token_tiles(metrics: RunMetrics) -> Iterator[tuple[str, str, str]]:
    ledger: dict[str, Any] = metrics.snapshots[-1].get("ledger", {}) if metrics.snapshots else {}
    accepted = number(metrics.summary, "tokens_accepted") or number(ledger, "accepted")
    trained = number(metrics.summary, "tokens_trained") or number(ledger, "trained")
    if accepted:
        yield "tokens generated", human(accepted), f"{human(trained or 0)} trained"
    balanced = metrics.summary.get("ledger_balanced")
    if isinstance(balanced, bool):
        yield "ledger", "balanced" if balanced else "out of balance", "each token in one account"


def _tile(name: str, value: str, note: str) -> str:
    return (
        f'<div class="tile"><span>{html.escape(name)}</span>'
        f"<b>{html.escape(value)}</b><span>{html.escape(note)}</span></div>"
    )


def _summary_table(metrics: RunMetrics) -> str:
    if not metrics.summary:
        return ""
    text = html.escape(json.dumps(metrics.summary, indent=2))
    return f"<h2>summary.json</h2><pre>{text}</pre>"
