"""``ringasync export``: weights of a run as a folder to load."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from ringasync.cli.options import RunsDirOption
from ringasync.cli.target import resolve_run_dir
from ringasync.config.load import config_from_json, load_config
from ringasync.config.schema import Config
from ringasync.errors import ConfigError
from ringasync.runtime.exporting import Exported, export_weights, find_weights
from ringasync.runtime.runfiles import SETTINGS_FILE, read_record

RUNS_DIR = Path("runs")


def export(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="Name or folder of the run, or its TOML file.")
    ],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Folder to write.")],
    version: Annotated[
        int | None,
        typer.Option("--version", min=1, metavar="N", help="Policy version (else: the newest)."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace DIR and all it holds if it is not empty.")
    ] = False,
    runs_dir: RunsDirOption = RUNS_DIR,
) -> None:
    """Write weights of a run as a Hugging Face folder: config.json, safetensors, tokenizer.

    Those of the newest checkpoint, or of a version that is still there as a published version, as
    an export of `learner.export_every_versions` or as a checkpoint. The run may be going on.

    Example: ringasync export demo --to models/demo-rl
    """
    run_dir, config, model = _run(run, runs_dir)
    found = find_weights(run_dir, version)
    done = asyncio.run(export_weights(config.run.name, config, model, found, to, force=force))
    _say(done, config.run.name, model)


def _run(run: str, runs_dir: Path) -> tuple[Path, Config, str]:
    """Folder, configuration and starting model of a run whose files are here."""
    if run.endswith(".toml"):
        config = load_config(Path(run))
        record = read_record(config.run_dir)
        return config.run_dir, config, record.model if record else config.model.path
    run_dir = resolve_run_dir(run, runs_dir)
    record = read_record(run_dir)
    try:
        config = config_from_json((run_dir / SETTINGS_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"nothing to export yet: run {run!r} never began to train") from None
    return run_dir, config, record.model if record else config.model.path


def _say(done: Exported, run: str, model: str) -> None:
    found, target = done.found, done.target
    what = f"version {found.version}, step {found.step}" if found.version else f"step {found.step}"
    typer.echo(f"run {run}: {what}, from {found.kind} {found.path}")
    typer.echo(f"{target}: {done.size_bytes / 1e6:.1f} MB")
    tokenizer = "" if done.has_tokenizer else f" --tokenizer {model}"
    typer.echo(f'transformers: AutoModelForCausalLM.from_pretrained("{target}")')
    typer.echo(f"vLLM:         vllm serve {target}{tokenizer}")
    if tokenizer:
        typer.echo(f"The tokenizer is that of {model}: the run began with it and copied none.")
