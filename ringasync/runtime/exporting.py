"""`ringasync export`: weights of a run as a folder that transformers and vLLM load.

They are looked for where they may still be: the published versions (``weights.transport`` = file or
nccl), the exports that the learner kept, the checkpoints. Files are copied; only a checkpoint has
to be converted, which a process of the learner's package does.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ringasync.config.schema import Config
from ringasync.durable import folder_bytes, room_at
from ringasync.errors import CheckpointError, ConfigError, EnvironmentRefusedError, ManifestError
from ringasync.records.weights import WeightManifest
from ringasync.runtime.process import describe_exit, thread_environment
from ringasync.runtime.roles import EXPORT_MODULE
from ringasync.weights.exports import Origin, fill_export, list_exports, read_origin, write_origin
from ringasync.weights.file_transport import FileTransport
from ringasync.weights.manifest import MANIFEST_FILE, load_manifest
from ringasync.weights.transport import fetched


@dataclass(frozen=True, slots=True)
class Found:
    """Weights of a run that can be exported: those after ``step`` batches.

    ``version`` is 0 for a checkpoint whose weights are of no published version. ``manifest`` is
    there for a published one.
    """

    kind: Literal["published version", "export", "checkpoint"]
    version: int
    step: int
    path: Path
    manifest: WeightManifest | None = None


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    found: Found
    target: Path
    size_bytes: int
    has_tokenizer: bool


def find_weights(run_dir: Path, version: int | None) -> Found:
    """The weights of ``version``; without one those of the newest checkpoint, and before there is
    any those of the newest version.

    Raises:
        ConfigError: there are none; names the versions that there are.
    """
    files = {found.version: found for found in (*_exports(run_dir), *_published(run_dir))}
    checkpoints = _checkpoints(run_dir)
    if version is None:
        if checkpoints:
            newest = checkpoints[0]
            same = files.get(newest.version)  # the same weights, and nothing to convert
            return same if same is not None and same.step == newest.step else newest
        if files:
            return files[max(files)]
        raise ConfigError(
            f"nothing to export yet in {run_dir}: no version is published there and no checkpoint "
            "is written (learner.checkpoint_every_steps)"
        )
    of_checkpoints = {found.version: found for found in reversed(checkpoints) if found.version}
    everything = of_checkpoints | files
    if version not in everything:
        there = ", ".join(map(str, sorted(everything))) or "none"
        raise ConfigError(
            f"the weights of version {version} are not in {run_dir} (any more); there: {there}. "
            "Older ones stay with learner.export_every_versions or a larger weights.keep_versions"
        )
    return everything[version]


async def export_weights(
    run: str, config: Config, model: str, found: Found, target: Path, *, force: bool
) -> Exported:
    """Write ``found`` into ``target``, which appears whole or not at all.

    ``model`` is the run's starting model, which a checkpoint is converted with.

    Raises:
        ConfigError: the target is taken.
        EnvironmentRefusedError: it cannot be written.
        ManifestError, CheckpointError: the weights are damaged, or were removed meanwhile.
    """
    origin = Origin(run, found.version, found.step)
    with _new_folder(target, found.path, force) as folder:
        if found.manifest is not None:
            transport = FileTransport(found.path.parent)
            try:
                async with fetched(transport, found.manifest, folder) as source:
                    fill_export(source, folder, origin, link=False)
            finally:
                await transport.close()
        elif found.kind == "export":
            fill_export(found.path, folder, origin, link=False)
        else:
            await _convert(found.path, model, config, folder)
            write_origin(folder, origin)
        names = {path.name for path in folder.iterdir()}
        size_bytes = sum(path.stat().st_size for path in folder.iterdir())
    has_tokenizer = bool(names & {"tokenizer.json", "tokenizer.model", "vocab.json"})
    return Exported(found, target, size_bytes, has_tokenizer)


def _published(run_dir: Path) -> Iterator[Found]:
    """Those of the file transport, by fence: of two with one number the later learner's counts."""
    folders = sorted(
        (run_dir / "weights").glob("v*-f*"),
        key=lambda path: int("0" + path.name.rpartition("-f")[2].partition(".")[0]),
    )
    for folder in folders:
        try:
            manifest = load_manifest((folder / MANIFEST_FILE).read_bytes())
        except (OSError, ManifestError):
            continue  # a lock file, or removed meanwhile
        version, step = manifest.policy_version, manifest.learner_step
        yield Found("published version", version, step, folder, manifest)


def _exports(run_dir: Path) -> Iterator[Found]:
    for version, folder in list_exports(run_dir / "exports"):
        try:
            origin = read_origin(folder)
        except ManifestError:
            continue
        yield Found("export", version, origin.learner_step, folder)


def _checkpoints(run_dir: Path) -> list[Found]:
    """Newest first, by life of the learner and then by step (``learner.checkpoint``)."""
    found = []
    for meta in (run_dir / "checkpoints").glob("step*/meta.json"):
        try:
            fields = json.loads(meta.read_text(encoding="utf-8"))
            step, life = int(fields["step"]), int(fields["life"])
            published = int(fields.get("published_step", -1)) == step
            version = int(fields["policy_version"]) if published else 0
        except (OSError, ValueError, KeyError, TypeError):
            continue  # removed meanwhile; the learner names damaged ones
        found.append((life, step, Found("checkpoint", version, step, meta.parent)))
    found.sort(key=lambda one: one[:2], reverse=True)
    return [one for _, _, one in found]


async def _convert(checkpoint: Path, model: str, config: Config, folder: Path) -> None:
    command = (
        *(sys.executable, "-m", EXPORT_MODULE, str(checkpoint), "--model", model),
        *("--dtype", config.model.dtype, "--to", str(folder)),
    )
    environment = os.environ | thread_environment(config.learner.threads)
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        env=environment,
    )
    try:
        code = await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if code:
        error = CheckpointError(
            f"{checkpoint} was not converted: {describe_exit(code)}; the reason is above"
        )
        error.exit_code = code if code > 0 else 128 - code
        raise error


@contextmanager
def _new_folder(target: Path, source: Path, force: bool) -> Iterator[Path]:
    """A temporary sibling of ``target`` that takes its place when the block is left in order."""
    target = target.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        if not target.is_dir():
            raise ConfigError(f"--to {target} is a file: name a folder")
        if not force:
            raise ConfigError(f"--to {target} is not empty: name another folder, or give --force")
    for kept in (source.resolve(), Path.cwd()):
        if kept.is_relative_to(target):  # --force must not remove these
            raise ConfigError(f"--to {target} holds {kept}: name another folder")
    staging: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
        staging.chmod(0o755)
        yield staging
        if target.exists() and any(target.iterdir()):
            if not force:
                raise ConfigError(f"--to {target} was filled meanwhile: name another folder")
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
            target.rename(old)
            staging.rename(target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            staging.rename(target)
    except OSError as error:
        room = room_at(target, folder_bytes(source))
        raise EnvironmentRefusedError(f"cannot write {target}: {error} ({room})") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
