"""What a figure was measured on: date, hardware, versions, command, and how busy it was."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import psutil

from ringasync import __version__

PACKAGES = ("redis", "hiredis", "uvloop", "numpy", "msgpack", "torch", "transformers")


def today() -> str:
    """The date in the names of result files, UTC."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def machine() -> dict[str, str]:
    """Everything a reader needs to judge or repeat a figure; never fails, may say "unknown"."""
    memory = psutil.virtual_memory().total / 2**30
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": str(_cores()),
        "memory": f"{memory:.1f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "load_average_before": " ".join(f"{load:.1f}" for load in os.getloadavg()),
        "python": platform.python_version(),
        "packages": ", ".join(
            [f"ringasync {__version__}", *(f"{name} {version(name)}" for name in PACKAGES)]
        ),
        "commit": _commit(),
        "command": command_line(),
    }


def version(package: str) -> str:
    """Installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def command_line() -> str:
    """How this process was started, without the folders of this machine."""
    script = Path(sys.argv[0])
    name = script.parent.name if script.name == "__main__.py" else f"benchmarks.{script.stem}"
    arguments = (Path(part).name if Path(part).is_absolute() else part for part in sys.argv[1:])
    return " ".join(["python -m", name, *arguments])


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown"


def _commit() -> str:
    git = shutil.which("git")
    if git is None:
        return "unknown"
    root = Path(__file__).parents[1]

    def run(*arguments: str) -> str:
        done = subprocess.run([git, "-C", str(root), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = run("rev-parse", "--short", "HEAD")
    changed = " with uncommitted changes" if run("status", "--porcelain") else ""
    return f"{commit}{changed}" if commit else "unknown"
