"""A run's folder: the record, the claim on it, and its removal."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ringasync.errors import ConfigError, EnvironmentRefusedError, LockHeldError
from ringasync.runtime.runfiles import (
    LOCK_FILE,
    RECORD_FILE,
    RunRecord,
    begin_record,
    claim,
    newest_run,
    read_record,
    remove_files,
    without_password,
)

RECORD = RunRecord("demo", "demo.toml", "abc", "redis://127.0.0.1:6379/0", "cache/model")


def test_record_reads_back(tmp_path: Path) -> None:
    RECORD.write(tmp_path)
    assert read_record(tmp_path) == RECORD
    assert [path.name for path in tmp_path.iterdir()] == [RECORD_FILE]


@pytest.mark.parametrize("text", ["", "[]", "null", '{"run": "demo"}', "\xff"])
def test_damaged_record_is_no_record(tmp_path: Path, text: str) -> None:
    (tmp_path / RECORD_FILE).write_bytes(text.encode("latin-1"))
    assert read_record(tmp_path) is None
    assert read_record(tmp_path / "absent") is None


def test_password_is_never_stored(tmp_path: Path) -> None:
    replace(RECORD, redis_url="rediss://me:secret@far:6380/2").write(tmp_path)
    assert "secret" not in (tmp_path / RECORD_FILE).read_text()
    assert read_record(tmp_path) == replace(RECORD, redis_url="rediss://me@far:6380/2")


@pytest.mark.parametrize(
    ("url", "safe"),
    [
        ("redis://127.0.0.1:6379/0", "redis://127.0.0.1:6379/0"),
        ("redis://:pw@host:1", "redis://host:1"),
        ("redis://u:p%40w@host:1/3?x=1", "redis://u@host:1/3?x=1"),
        ("unix:///run/redis.sock", "unix:///run/redis.sock"),
    ],
)
def test_url_without_password(url: str, safe: str) -> None:
    assert without_password(url) == safe


def test_newest_run_is_the_one_started_last(tmp_path: Path) -> None:
    assert newest_run(tmp_path) is None
    for age, name in enumerate(["young", "old"]):
        (tmp_path / name).mkdir()
        RECORD.write(tmp_path / name)
        os.utime(tmp_path / name / RECORD_FILE, (1000 - age, 1000 - age))
    (tmp_path / "no-run").mkdir()
    assert newest_run(tmp_path) == tmp_path / "young"


HOLD = """
import sys, time
from pathlib import Path
from ringasync.runtime.runfiles import claim
with claim(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_folder_has_one_owner_until_that_process_is_gone(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "demo"
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run_dir)], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == "held\n"
    with pytest.raises(LockHeldError, match=f"process {owner.pid}"), claim(run_dir):
        pass
    owner.kill()
    owner.communicate(timeout=20)
    with claim(run_dir):
        assert (run_dir / LOCK_FILE).read_text() == f"{os.getpid()}\n"


def test_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(EnvironmentRefusedError, match=r"set run\.dir"),
        claim(tmp_path / "file/demo"),
    ):
        pass


def test_removal_takes_everything_but_the_lock(tmp_path: Path) -> None:
    with claim(tmp_path):
        RECORD.write(tmp_path)
        (tmp_path / "logs").mkdir()
        (tmp_path / "logs" / "learner.log").write_text("x")
        (tmp_path / "link").symlink_to("/")
        remove_files(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
    remove_files(tmp_path / "absent")


def test_folder_without_a_run_is_never_removed(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="holds files but no run"):
        remove_files(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_folder_of_somebody_else_is_not_taken_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with claim(tmp_path), pytest.raises(ConfigError, match=r"thesis\.txt.*another run\.name"):
        begin_record(tmp_path, RECORD)
    assert read_record(tmp_path) is None


def test_folder_in_which_roles_were_started_by_hand_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    begin_record(tmp_path, RECORD)
    begin_record(tmp_path, replace(RECORD, model="another"))
    assert read_record(tmp_path) == RECORD
