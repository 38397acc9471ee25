"""The wheel as a user has it: built, installed into a fresh environment, run there.

Dependencies are those of the environment that runs the tests (`make wheel-test` installs them from
the registry instead). The fresh environment sees them as a path, so no editable install leaks in.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from ringasync import __version__

ROOT = Path(__file__).parents[2]
PACKAGES = ("ringasync", "workers", "learner")


def call(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Output of a command that must succeed; nothing of this checkout is on its path."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "RINGASYNC_"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean | {"COLUMNS": "200", "NO_COLOR": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves a build folder beside the sources."""
    source = tmp_path_factory.mktemp("source")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", "dist")
    call(sys.executable, "-m", "pip", "wheel", ".", *options, cwd=source)
    [built] = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def bin_dir(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Commands of a fresh environment that holds the wheel."""
    place = tmp_path_factory.mktemp("fresh")
    venv.create(place, with_pip=False, symlinks=True)
    bin_dir = place / "bin"
    python = bin_dir / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install")
    call(*pip, "--no-deps", "--no-index", wheel, cwd=place)
    paths = {"base": str(place), "platbase": str(place)}
    site = Path(sysconfig.get_path("purelib", "venv", vars=paths))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return bin_dir


def test_files_of_all_packages_are_in_the_wheel(wheel: Path) -> None:
    wanted = {
        path.relative_to(ROOT).as_posix()
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == wanted
    assert {f"{name}/py.typed" for name in PACKAGES} <= packed


def test_installed_package_is_the_one_that_runs(bin_dir: Path, tmp_path: Path) -> None:
    code = "import ringasync.broker.core, workers, learner; print(ringasync.__file__)"
    assert str(bin_dir.parent) in call(bin_dir / "python", "-c", code, cwd=tmp_path)


def test_metadata_has_extras_and_entry_points(bin_dir: Path, tmp_path: Path) -> None:
    code = (
        "from importlib.metadata import distribution as d; r = d('ringasync');"
        "print(r.version, *r.metadata.get_all('Provides-Extra'),"
        " *(f'{e.group}:{e.name}' for e in r.entry_points))"
    )
    words = call(bin_dir / "python", "-c", code, cwd=tmp_path).split()
    assert words[0] == __version__
    assert {"cpu", "vllm", "console_scripts:ringasync", "vllm.general_plugins:ringasync"} <= set(
        words
    )


def test_help_init_and_check(bin_dir: Path, tmp_path: Path) -> None:
    command = bin_dir / "ringasync"
    assert call(command, "--version", cwd=tmp_path) == f"ringasync {__version__}\n"
    assert " init " in call(command, "--help", cwd=tmp_path)
    call(command, "init", cwd=tmp_path)
    assert "ringasync.toml: valid" in call(
        command, "config", "--check", "ringasync.toml", cwd=tmp_path
    )


@pytest.mark.parametrize(
    ("shell", "words"),
    [
        ("bash", {"COMP_WORDS": "ringasync con", "COMP_CWORD": "1"}),
        ("zsh", {"_TYPER_COMPLETE_ARGS": "ringasync con"}),
        (
            "fish",
            {"_TYPER_COMPLETE_ARGS": "ringasync con", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
        ),
    ],
)
def test_shell_completion(bin_dir: Path, tmp_path: Path, shell: str, words: dict[str, str]) -> None:
    environment = {"_RINGASYNC_COMPLETE": f"complete_{shell}", **words}
    answer = call(bin_dir / "ringasync", cwd=tmp_path, **environment)
    assert "config" in answer
    assert "worker" not in answer
