"""The documentation site: its generated pages are complete, and it builds without a warning."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from typer.core import TyperGroup

from docsite import reference
from ringasync.broker.keys import Keys
from ringasync.cli.main import app
from ringasync.config.keys import known_keys
from ringasync.errors import ConfigError

ROOT = Path(__file__).parents[1]


def test_every_setting_is_on_the_configuration_page() -> None:
    shown = re.findall(r"^\| `(\S+)` \|", reference.configuration_page(), re.MULTILINE)
    assert sorted(shown) == sorted(known_keys())


def test_every_command_and_option_is_on_the_command_page() -> None:
    page = reference.cli_page()
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    for name, command in group.commands.items():
        section = re.search(rf"^## `ringasync {name}`$(.*?)(^## |\Z)", page, re.M | re.S)
        assert section, name
        options = [option for each in command.params for option in each.opts if option[0] == "-"]
        assert [option for option in options if option not in section[1]] == []


def test_every_key_is_on_the_key_page() -> None:
    keys, page = Keys("RUN"), reference.keys_page()
    plain = [name for name in vars(keys) if name not in ("run", "prefix")]
    methods = [name for name in vars(Keys) if not name.startswith("_")]
    assert [name for name in plain + methods if f"| `Keys.{name}` |" not in page] == []
    assert "| `…session:ID` | `Keys.session` | hash |" in page


def test_a_key_that_the_table_lacks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = reference.KEYS_PAGE.read_text(encoding="utf-8")
    short = tmp_path / "redis-cli.md"
    short.write_text(re.sub(r"^\| `…live` .*\n", "", text, flags=re.M), encoding="utf-8")
    monkeypatch.setattr(reference, "KEYS_PAGE", short)
    with pytest.raises(ConfigError, match=r"…live \(Keys\.live\): add a row to the table"):
        reference.keys_page()


@pytest.mark.skipif(importlib.util.find_spec("material") is None, reason="needs ringasync[docs]")
def test_the_site_builds(tmp_path: Path) -> None:
    """Strictly: a page outside the navigation or a link that leads nowhere fails."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert 'class="mermaid"' in (tmp_path / "architecture" / "index.html").read_text("utf-8")
    page = (tmp_path / "reference" / "configuration" / "index.html").read_text("utf-8")
    assert "learner.lr" in page
