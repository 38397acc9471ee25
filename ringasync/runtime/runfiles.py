"""A run's own folder: who works in it, where its broker and model are, and how it is removed.

::

    runs/NAME/run.json        this record, so that tools find the run by its name
    runs/NAME/up.lock         held while `ringasync up` works on the run
    runs/NAME/logs/           what each role wrote
    runs/NAME/replay/         what `ringasync replay` wrote, by label
    runs/NAME/redis/          data of the embedded Redis
    runs/NAME/exports/        versions that the learner was told to keep
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from ringasync.config.load import config_hash, resolved_json
from ringasync.config.schema import Config
from ringasync.errors import (
    MALFORMED_JSON,
    ConfigError,
    EnvironmentRefusedError,
    LockHeldError,
)

RECORD_FILE = "run.json"
LOCK_FILE = "up.lock"
SETTINGS_FILE = "config.json"

OWN_NAMES = frozenset(
    {
        *(RECORD_FILE, LOCK_FILE, SETTINGS_FILE, "redis", "logs", "feeding.json"),
        *("metrics.jsonl", "tensorboard", "wandb", "summary.json", "report.html"),
        *("weights", "publish", "exports", "checkpoints", "journal", "replay"),
    }
)
"""What roles write into a run's folder. A folder that holds other things is somebody's own."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What a tool must know to find a run again. No secrets: a password in the URL is left out."""

    run: str
    config_file: str
    config_hash: str
    redis_url: str
    model: str

    @classmethod
    def of(cls, config: Config, config_path: Path, redis_url: str, model: str) -> RunRecord:
        """The record of a run that starts with this configuration."""
        file, digest = str(config_path.resolve()), config_hash(config)
        return cls(config.run.name, file, digest, redis_url, model)

    def write(self, run_dir: Path) -> None:
        """Store as ``run.json``, whole or not at all."""
        safe = asdict(self) | {"redis_url": without_password(self.redis_url)}
        temporary = run_dir / f"{RECORD_FILE}.{os.getpid()}"
        temporary.write_text(json.dumps(safe, indent=2) + "\n", encoding="utf-8")
        temporary.replace(run_dir / RECORD_FILE)


def write_settings(config: Config) -> None:
    """Keep every setting of the run in its folder, as ``config.json``."""
    text = resolved_json(config) + "\n"
    config.run_dir.joinpath(SETTINGS_FILE).write_text(text, encoding="utf-8")


def begin_record(run_dir: Path, record: RunRecord) -> None:
    """Mark the folder as this run's before anything else is written; a record there stays.

    Raises:
        ConfigError: the folder holds things that no run wrote, and ``rm`` would remove them.
    """
    if read_record(run_dir) is not None:
        return
    strange = sorted(path.name for path in run_dir.iterdir() if path.name not in OWN_NAMES)
    if strange:
        raise ConfigError(
            f"{run_dir} holds things that belong to no run ({', '.join(strange[:3])}): "
            "choose another run.name or run.dir"
        )
    record.write(run_dir)


def read_record(run_dir: Path) -> RunRecord | None:
    """The record of the run in this folder, or None when there is none that can be read."""
    try:
        data = json.loads((run_dir / RECORD_FILE).read_text(encoding="utf-8"))
        return RunRecord(**{name: str(data[name]) for name in RunRecord.__dataclass_fields__})
    except (FileNotFoundError, NotADirectoryError, *MALFORMED_JSON):
        return None


def without_password(url: str) -> str:
    """The URL with its password, if any, left out; the user's name stays."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    host = parts.netloc.rpartition("@")[2]
    user = f"{parts.username}@" if parts.username else ""
    return urlunsplit(parts._replace(netloc=user + host))


def newest_run(runs_dir: Path) -> Path | None:
    """The folder of the run that was started last, or None when there is no run."""
    records = list(runs_dir.glob(f"*/{RECORD_FILE}"))
    return max(records, key=lambda path: path.stat().st_mtime).parent if records else None


@contextlib.contextmanager
def claim(run_dir: Path) -> Iterator[None]:
    """Hold the run's folder for this process; the kernel lets go when the process ends.

    Raises:
        LockHeldError: another ``ringasync up`` works on this run; names its process id.
        EnvironmentRefusedError: the folder cannot be made or written.
    """
    path = run_dir / LOCK_FILE
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise EnvironmentRefusedError(
            f"cannot write in the run's folder {run_dir}: {error.strerror} (set run.dir)"
        ) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(handle, 64, 0).decode("utf-8", errors="replace").strip()
            age_ms = int((time.time() - os.fstat(handle).st_mtime) * 1000)
            raise LockHeldError("up", f"process {owner}", age_ms) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def remove_files(run_dir: Path) -> None:
    """Delete all that the run wrote; the lock file stays with whoever holds it.

    Raises:
        ConfigError: the folder holds no run, so it is none of ours to delete.
    """
    if not run_dir.exists():
        return
    entries = [path for path in run_dir.iterdir() if path.name != LOCK_FILE]
    if entries and not (run_dir / RECORD_FILE).exists():
        raise ConfigError(
            f"{run_dir} holds files but no run ({RECORD_FILE} is missing): not removed"
        )
    # The record goes last: a removal that was interrupted can be repeated.
    for path in sorted(entries, key=lambda each: each.name == RECORD_FILE):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
