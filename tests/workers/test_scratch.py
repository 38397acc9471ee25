"""The folder of a living worker stays, that of a killed one goes when the next worker starts."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from workers import scratch
from workers.scratch import scratch_folder

_HOLD = """
from workers.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "model.safetensors").write_bytes(bytes(1000))
    print(folder, flush=True)
    input()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The host's folder for temporary files, for this process and its children."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


@contextmanager
def holder() -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that has a scratch folder with something in it."""
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ},
    ) as process:
        try:
            assert process.stdout is not None
            yield process, Path(process.stdout.readline().strip())
        finally:
            process.kill()


def test_nothing_is_left_at_the_end(temporary: Path) -> None:
    with scratch_folder() as folder:
        assert folder.parent == temporary
        assert list(folder.iterdir()) == []
        (folder / "part").write_bytes(b"x")
    assert list(temporary.iterdir()) == []


def test_what_a_killed_worker_left_goes_and_a_living_one_s_stays(temporary: Path) -> None:
    with holder() as (killed, left), holder() as (_, kept):
        killed.kill()
        killed.wait()
        assert (left / "model.safetensors").exists()
        with scratch_folder() as mine:
            assert not left.exists()
            assert (kept / "model.safetensors").exists()
            held = {mine, kept, *(p.with_name(p.name + ".lock") for p in (mine, kept))}
            assert set(temporary.iterdir()) == held


def test_a_folder_whose_lock_was_swept_at_birth_is_made_again(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []
    owns = scratch._owns

    def swept_once(descriptor: int, lock: Path) -> bool:
        if not made:
            lock.unlink()
        made.append(lock)
        return owns(descriptor, lock)

    monkeypatch.setattr(scratch, "_owns", swept_once)
    with scratch_folder() as folder:
        assert len(made) == 2
        assert folder.name + ".lock" == made[1].name
    assert list(temporary.iterdir()) == []


def test_what_is_not_ours_is_left_alone(temporary: Path) -> None:
    elsewhere = temporary / "elsewhere"
    elsewhere.write_bytes(b"precious")
    (temporary / f"{scratch.PREFIX}link.lock").symlink_to(elsewhere)
    (temporary / f"{scratch.PREFIX}older").mkdir()  # no lock: nobody knows whose it is
    with scratch_folder():
        pass
    assert elsewhere.read_bytes() == b"precious"
    assert (temporary / f"{scratch.PREFIX}older").is_dir()
