"""Result files: JSON for programs, markdown for people, no paths of this machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.machine import command_line, machine
from benchmarks.report import Result, Table, as_markdown, write
from benchmarks.stats import Spread


def _result() -> Result:
    table = Table("Cost", ["", "ours", "bare"], [["bytes", 9.5, "-"]], "Of a token.")
    return Result("Broker", {"rounds": 3}, {"ours": 9.512345}, [table], ["be careful"])


def test_markdown_is_a_table_with_settings_and_machine() -> None:
    page = as_markdown([_result()], {"date": "2026-11-23", "load_average_before": "0.1"})
    assert page.splitlines()[0] == "# Benchmarks, 2026-11-23"
    assert "- load average before: 0.1" in page
    assert "Settings: rounds=3" in page
    assert "|  | ours | bare |\n|---|---:|---:|\n| bytes | 9.50 | - |\n\nOf a token." in page
    assert page.endswith("- be careful\n")


def test_a_row_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="has not 3 cells"):
        Table("Cost", ["", "ours", "bare"], [["bytes", 1.0]]).markdown()


def test_files_keep_whole_numbers_and_a_dot_in_the_name(tmp_path: Path) -> None:
    paths = write(tmp_path / "new" / "bench-1.5", [_result()], {"date": "today"})
    assert [path.name for path in paths] == ["bench-1.5.json", "bench-1.5.md"]
    whole = json.loads(paths[0].read_text())
    assert whole["machine"] == {"date": "today"}
    assert whole["results"][0]["figures"]["ours"] == 9.512345
    assert paths[1].read_text() == as_markdown([_result()], {"date": "today"})


def test_spreads_survive_as_json(tmp_path: Path) -> None:
    result = Result("x", {}, {"rate": Spread(2.0, 1.0, 3.0)}, [])
    found = json.loads(write(tmp_path / "x", [result], {"date": ""})[0].read_text())
    assert found["results"][0]["figures"]["rate"] == {"median": 2.0, "low": 1.0, "high": 3.0}


def test_machine_says_what_a_reader_needs_and_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(Path(__file__).parents[2])
    monkeypatch.setattr(sys, "argv", [f"{root}/benchmarks/broker.py", "--out", f"{root}/x"])
    found = machine()
    assert found["command"] == "python -m benchmarks.broker --out x"
    assert int(found["cores"]) >= 1
    assert "redis 8" in found["packages"] or "redis 7" in found["packages"]
    assert all(found.values())
    assert root not in json.dumps(found)
    monkeypatch.setattr(sys, "argv", [f"{root}/benchmarks/__main__.py"])
    assert command_line() == "python -m benchmarks"
