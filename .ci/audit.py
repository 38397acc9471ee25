"""Known vulnerabilities of the versions in constraints.txt, by pip-audit (`make audit`).

Exit 1: a package that pyproject.toml names has one, and `audit-allowed.toml` gives no reason to
live with it. Exit 0: there is none, or no database could be asked, which is said as NOT REACHED.

Each question also holds a canary, an old package with known vulnerabilities: a database that does
not know them was not reached, whatever pip-audit says. (A mirror of the index without the
vulnerability API makes it say "No known vulnerabilities found".)
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TOOL = "pip-audit==2.10.1"
TOOL_VENV = ROOT / ".venv-audit"
CANARY = ("django", "2.0")
SERVICES = ("pypi", "osv")
TIMEOUT_S = 300

Report = dict[str, dict[str, str]]
"""Package -> id of a vulnerability -> the versions that mend it."""


class NotReachedError(Exception):
    """No answer that can be trusted; why."""


def direct_names(pyproject: Path) -> set[str]:
    """Packages that we name ourselves, with all extras."""
    project = tomllib.loads(pyproject.read_text("utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    return {normal(re.split(r"[<>=!~\[; ]", line)[0]) for each in lists for line in each}


def normal(name: str) -> str:
    """PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def ask(tool: list[str], constraints: Path, service: str) -> Report:
    """One database's answer. Raises ``NotReachedError``."""
    with tempfile.TemporaryDirectory() as folder:
        canary = Path(folder) / "canary.txt"
        canary.write_text("==".join(CANARY) + "\n", encoding="utf-8")
        options = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "-f", "json"]
        files = ["-r", str(constraints), "-r", str(canary)]
        try:
            done = subprocess.run(  # noqa: S603 - our own tool and arguments
                [*tool, *files, *options, "-s", service, "--timeout", "20"],
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NotReachedError(f"{service}: {error}") from None
    try:
        rows: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        said = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise NotReachedError(f"{service}: pip-audit exit {done.returncode}: {said}") from None
    found = {
        normal(row["name"]): {
            one["id"]: ", ".join(one.get("fix_versions", [])) or "none"
            for one in row.get("vulns", [])
        }
        for row in rows
    }
    if not found.pop(CANARY[0], None):
        raise NotReachedError(f"{service}: it knows nothing of {'=='.join(CANARY)}")
    unknown = [row["name"] for row in rows if "skip_reason" in row]
    if unknown:
        print(f"audit: {service} does not know {', '.join(unknown)}")
    return found


def judge(found: Report, direct: set[str], allowed: dict[str, str]) -> int:
    """Print the findings; 1 when one of them is ours and not allowed."""
    red = 0
    seen = set()
    for name, vulnerabilities in sorted(found.items()):
        for number, mended in vulnerabilities.items():
            seen.add(number)
            if number in allowed:
                verdict = f"allowed: {allowed[number]}"
            elif name in direct:
                verdict, red = "RED", 1
            else:
                verdict = "comes with another package; not ours to pin"
            print(f"audit: {name}: {number}, mended in {mended}: {verdict}")
    for number in sorted(set(allowed) - seen):
        print(f"audit: {number} is allowed and no longer found: take it out of audit-allowed.toml")
    known = sum(map(len, found.values()))
    print(f"audit: {len(found)} packages, {known} known vulnerabilities, {'RED' if red else 'ok'}")
    return red


def own_tool() -> list[str]:
    """pip-audit in an environment of its own: its packages must not decide ours."""
    python = TOOL_VENV / "bin" / "python"
    if not (TOOL_VENV / "bin" / "pip-audit").exists():
        venv.create(TOOL_VENV, with_pip=True)
        pip = [str(python), "-I", "-m", "pip", "--disable-pip-version-check", "--no-input"]
        done = subprocess.run([*pip, "install", "-q", TOOL], capture_output=True, text=True)  # noqa: S603
        if done.returncode != 0:
            raise NotReachedError(f"pip install {TOOL}: {done.stderr.strip()[-200:]}")
    return [str(python), "-I", "-m", "pip_audit"]  # -I: no PYTHONPATH of whoever calls


def main() -> int:
    """Ask the databases in turn until one answers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tool", nargs="+", help="another pip-audit")
    parser.add_argument("--constraints", type=Path, default=ROOT / "constraints.txt")
    parser.add_argument("--allowed", type=Path, default=ROOT / ".ci" / "audit-allowed.toml")
    options = parser.parse_args()
    allowed = tomllib.loads(options.allowed.read_text("utf-8"))["allowed"]
    reasons = []
    for service in SERVICES:
        try:
            found = ask(options.tool or own_tool(), options.constraints, service)
        except NotReachedError as error:
            reasons.append(str(error))
            continue
        return judge(found, direct_names(ROOT / "pyproject.toml"), allowed)
    print("audit: NOT REACHED, nothing was checked: " + "; ".join(reasons))
    return 0


if __name__ == "__main__":
    sys.exit(main())
