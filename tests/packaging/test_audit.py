"""`.ci/audit.py`: red for what is known and ours, never for a database that cannot be asked.

pip-audit itself is asked in CI (`make audit`). Here its answers are given, in its own format.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CANARY = {"name": "django", "version": "2.0", "vulns": [{"id": "PYSEC-1", "fix_versions": []}]}


def row(name: str, *ids: str) -> dict[str, Any]:
    vulns = [{"id": one, "fix_versions": ["9.9"], "description": "..."} for one in ids]
    return {"name": name, "version": "1.0", "vulns": vulns}


def audit(
    folder: Path, *answers: list[dict[str, Any]] | None, allowed: str = ""
) -> tuple[int, str]:
    """Exit code and output; ``answers`` are those of the services in turn, None: a crash."""
    for service, rows in zip(("pypi", "osv"), [*answers, None], strict=False):
        if rows is not None:
            answer = {"dependencies": rows, "fixes": []}
            (folder / f"{service}.json").write_text(json.dumps(answer))
    tool = folder / "tool.py"
    tool.write_text(
        "import sys, pathlib\n"
        "name = sys.argv[sys.argv.index('-s') + 1]\n"
        f"print(pathlib.Path({str(folder)!r}, name + '.json').read_text())\n"
    )
    (folder / "allowed.toml").write_text("[allowed]\n" + allowed)
    arguments = ["--allowed", str(folder / "allowed.toml"), "--tool", sys.executable, str(tool)]
    done = subprocess.run(
        [sys.executable, str(ROOT / ".ci" / "audit.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_a_known_vulnerability_of_our_own_pin_is_red(tmp_path: Path) -> None:
    code, said = audit(tmp_path, [CANARY, row("Redis", "GHSA-x"), row("torch")])
    assert code == 1
    assert "redis: GHSA-x, mended in 9.9: RED" in said


def test_one_that_is_listed_with_a_reason_is_not(tmp_path: Path) -> None:
    rows = [CANARY, row("redis", "GHSA-x")]
    code, said = audit(tmp_path, rows, allowed='GHSA-x = "we use no pub/sub"\nGHSA-old = "gone"\n')
    assert code == 0
    assert "allowed: we use no pub/sub" in said
    assert "GHSA-old is allowed and no longer found" in said


def test_one_of_a_package_that_comes_with_another_is_said(tmp_path: Path) -> None:
    code, said = audit(tmp_path, [CANARY, row("pyfiglet", "CVE-1")])
    assert code == 0
    assert "pyfiglet: CVE-1, mended in 9.9: comes with another package" in said


def test_a_database_that_does_not_know_the_canary_was_not_reached(tmp_path: Path) -> None:
    """pip-audit exits 0 and finds nothing where the index lacks the vulnerability API."""
    skipped = {"name": "django", "skip_reason": "Dependency not found on PyPI"}
    code, said = audit(tmp_path, [skipped, row("redis")])
    assert code == 0
    assert "NOT REACHED, nothing was checked: pypi: it knows nothing of django==2.0" in said
    assert "osv: pip-audit exit 1: FileNotFoundError" in said


def test_the_second_database_is_asked_when_the_first_is_out(tmp_path: Path) -> None:
    code, said = audit(tmp_path, None, [CANARY, row("torch", "GHSA-y")])
    assert code == 1
    assert "torch: GHSA-y" in said
