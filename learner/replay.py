"""``python -m learner.replay RUN_DIR``: the learner once more over a run's journal.

``ringasync replay`` runs it. No Redis, no workers, no lock: journal, checkpoints and metrics are
only read, the optimizer's state lives in memory, and results go to ``RUN_DIR/replay/LABEL``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from learner.journal import JournalReader
from learner.replay_report import Comparison, summary_table, write_json
from ringasync.coordinator.metrics_file import METRICS_FILE, encode_line
from ringasync.errors import CheckpointError, ConfigError, JournalError, RingError
from ringasync.observability.log import configure_logging
from ringasync.observability.run_metrics import read_run
from ringasync.runtime.replay import ReplaySettings, replay_settings
from ringasync.runtime.role import report_error
from ringasync.runtime.runfiles import read_record

if TYPE_CHECKING:  # torch loads late: refusals come at once
    from learner.backends.base import Backend
    from learner.checkpoint import CheckpointMeta
    from learner.state import LearnerState

_Line = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """What the command line says. ``label`` and ``model`` empty: by the changes, as the run had."""

    run_dir: Path
    overrides: tuple[str, ...] = ()
    from_version: int | None = None
    steps: int | None = None
    label: str = ""
    model: str = ""


@dataclass(frozen=True, slots=True)
class Recorded:
    """What the run left: its journal, and its step lines by step (1 is the first)."""

    journal: JournalReader
    steps: Mapping[int, _Line]


def _alone(settings: ReplaySettings) -> ReplaySettings:
    """The settings with one rank: a replay is one process, whatever the run's learner was."""
    learner = settings.config.learner.model_copy(update={"ranks": 1})
    return replace(settings, config=settings.config.model_copy(update={"learner": learner}))


def replay(options: ReplayOptions) -> int:
    """Replay, write lines and summary, print the table; returns the exit code.

    Raises ``ConfigError``, ``JournalError``, ``CheckpointError`` or ``TrainingError``.
    """
    began_s = time.monotonic()
    console = Console()
    settings = _alone(replay_settings(options.run_dir, options.overrides))
    run = settings.config.run.name
    recorded = read_recorded(options.run_dir, run)
    model = options.model or _model_of(options.run_dir)

    import torch

    from learner.app import make_backend
    from learner.devices import arithmetic

    torch.set_num_threads(settings.config.learner.threads)
    start = choose_start(options, run, recorded)
    count_steps(recorded, 0 if start is None else start.step, options.steps)  # refuse early
    backend = make_backend(settings.config, model)
    backend.onload()
    state, began_at = _begin(options, run, recorded, backend)
    count = count_steps(recorded, state.step, options.steps)
    console.print(f"replay of {run}: {count} steps from {began_at}", markup=False, highlight=False)

    comparison = Comparison(
        recorded.steps, arithmetic(settings.config.learner), is_exact=not settings.changed
    )
    label = options.label or settings.default_label
    folder = options.run_dir / "replay" / label
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / METRICS_FILE).open("wb") as file, _progress(console, count) as report:
        for metrics in _train(recorded, settings, backend, state, count):
            line = comparison.add(metrics)
            file.write(encode_line(line))
            file.flush()
            report(line)
    summary = {
        "run": run,
        "label": label,
        "began_at": began_at,
        "changed": dict(settings.changed),
        "was": settings.was,
        **comparison.summary(),
        "wall_s": round(time.monotonic() - began_s, 3),
    }
    write_json(folder / "summary.json", summary)
    console.print(summary_table(summary))
    console.print(f"written: {folder}", markup=False, highlight=False, soft_wrap=True)
    return _verdict(settings, comparison)


def read_recorded(run_dir: Path, run: str) -> Recorded:
    """Journal and metrics. Raises ``JournalError`` when there is none, or batches are missing."""
    # First the metrics: what a living learner reports in between is then in the journal as well.
    steps = {int(line["step"]): line for line in read_run(run_dir).steps}
    directory = run_dir / "journal"
    if not directory.is_dir():
        raise JournalError(
            f"{directory}: no journal here. The learner keeps it in its own run folder: replay on "
            "the machine that it ran on, or copy that folder"
        )
    journal = JournalReader.look(directory, run)
    if not journal.entries:
        raise JournalError(f"{directory}: holds no batch yet, so there is nothing to replay")
    for expected, entry in enumerate(journal.entries):
        if entry.step != expected:
            raise JournalError(
                f"{directory}: the batch of step {expected + 1} is missing; batch {entry.batch_id} "
                f"of step {entry.step + 1} comes instead. Restore the folder from a copy"
            )
    return Recorded(journal, steps)


def choose_start(options: ReplayOptions, run: str, recorded: Recorded) -> CheckpointMeta | None:
    """The checkpoint that ``--from`` means; None for the starting model.

    Raises ``ConfigError`` for a version that the run never had; lists the checkpoints.
    """
    from learner.checkpoint import list_checkpoints, read_meta

    version = options.from_version
    if version is None:
        return None
    usable: list[CheckpointMeta] = []
    for path in list_checkpoints(options.run_dir / "checkpoints"):
        with suppress(CheckpointError):  # `restore` passes over it as well, with a warning
            meta = read_meta(path)
            if meta.run == run and recorded.journal.covers(meta.life, meta.journal_offset):
                usable.append(meta)
    entries = recorded.journal.entries
    first, newest = entries[0].policy_version, entries[-1].policy_version
    newest = max([newest, *(one.policy_version for one in usable)])
    newest = max([newest, *(int(one.get("policy_version", 0)) for one in recorded.steps.values())])
    if not first <= version <= newest:
        listed = [f"{one.policy_version} (step {one.step})" for one in reversed(usable)]
        raise ConfigError(
            f"--from {version}: there is no checkpoint of that version or below. The run's "
            f"versions are {first} (the starting model) to {newest}; checkpoints: "
            f"{', '.join(listed) or 'none'}"
        )
    return next((one for one in usable if one.policy_version <= version), None)


def count_steps(recorded: Recorded, start_step: int, wanted: int | None) -> int:
    """How many steps to replay from ``start_step`` on.

    Raises ``JournalError`` when the run made steps among them that the journal has lost, and
    ``ConfigError`` when there are none.
    """
    held = len(recorded.journal.entries)
    last = recorded.journal.entries[-1]
    made = max(recorded.steps, default=0)
    end = max(held, made) if wanted is None else min(start_step + wanted, max(held, made))
    if end > held:
        lost = recorded.steps.get(held + 1, {}).get("batch_id", "unknown")
        raise JournalError(
            f"the journal ends after batch {last.batch_id} of step {held}, but the run made "
            f"{made} steps: batch {lost} of step {held + 1} is torn or lost. Restore the folder "
            f"from a copy, or replay what is there by --steps {max(1, held - start_step)}"
        )
    if end <= start_step:
        raise ConfigError(
            f"nothing to replay: the journal ends at step {held}, and so does the checkpoint to "
            "begin at. Give an older version by --from, or leave it away"
        )
    return end - start_step


def _begin(
    options: ReplayOptions, run: str, recorded: Recorded, backend: Backend
) -> tuple[LearnerState, str]:
    """Bring the backend to the start; its state, and where that is in words."""
    from learner.app import restore
    from learner.state import LearnerState

    first = recorded.journal.entries[0].policy_version
    state = LearnerState()
    if options.from_version is not None:
        state = restore(
            options.run_dir, run, backend, recorded.journal, max_version=options.from_version
        )
    if state.step == 0:
        return state, f"the starting model (version {first})"
    return state, f"the checkpoint of step {state.step} (version {state.policy_version})"


def _train(
    recorded: Recorded,
    settings: ReplaySettings,
    backend: Backend,
    state: LearnerState,
    count: int,
) -> Iterator[_Line]:
    """Train ``count`` batches behind ``state``; yields each step's metrics."""
    from learner.catch_up import train_record, untrained_records
    from learner.step_metrics import StepTimes, TrainedStep, step_metrics

    for entry, record in islice(untrained_records(recorded.journal, state), count):
        began_s = time.monotonic()
        batch, result = train_record(backend, record)
        times = StepTimes(train_s=time.monotonic() - began_s)
        state.advance(record, entry.end, batch)
        made = recorded.steps.get(state.step, {}).get("policy_version", record.policy_version)
        done = TrainedStep(record, batch, result, times, replayed=True)
        yield step_metrics(done, settings.config.loss, int(made))


def _verdict(settings: ReplaySettings, comparison: Comparison) -> int:
    if settings.is_comparison:
        return 0
    if comparison.first is not None:
        print(
            f"the replay is not the run: {comparison.first}. Another starting model (--model), "
            "another build or torch, or a damaged checkpoint would explain it",
            file=sys.stderr,
        )
        return 1
    if not comparison.compared:
        print("metrics.jsonl has none of these steps: nothing was compared", file=sys.stderr)
        return 1
    return 0


def _model_of(run_dir: Path) -> str:
    record = read_record(run_dir)
    if record is None or not record.model:
        raise ConfigError(f"{run_dir}/run.json names no starting model: give it by --model")
    return record.model


@contextmanager
def _progress(console: Console, count: int) -> Iterator[Callable[[_Line], None]]:
    """A bar on a terminal, else a line a step."""
    if not console.is_terminal:
        yield lambda line: print(_words(line), flush=True)
        return
    with Progress(
        TextColumn("replaying"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}{task.fields[words]}"),
        TimeRemainingColumn(),
        console=console,
    ) as bar:
        task = bar.add_task("steps", total=count, words="")
        yield lambda line: bar.update(task, advance=1, words=f"  {_words(line)}")


def _words(line: _Line) -> str:
    difference = line["loss_difference"]
    beside = "not recorded" if difference is None else f"recorded {line['recorded_loss']:.6g}"
    apart = "" if difference is None else f", difference {difference:.3g}"
    return f"step {line['step']}: loss {line['loss']:.6g} ({beside}{apart})"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser("python -m learner.replay", description="Replay a journal.")
    parser.add_argument("run_dir", type=Path, help="folder of the run")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--from", dest="from_version", type=int, metavar="VERSION")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--label", default="")
    parser.add_argument("--model", default="")
    given = parser.parse_args(argv)
    options = ReplayOptions(
        given.run_dir,
        tuple(given.overrides),
        given.from_version,
        given.steps,
        given.label,
        given.model,
    )
    configure_logging("replay", options.run_dir.name, None, "warning")
    try:
        return replay(options)
    except RingError as error:
        return report_error(error)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
