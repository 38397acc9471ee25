"""``ringasync init``: the file says every setting and changes none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ringasync.cli.init_command import init
from ringasync.cli.main import app
from ringasync.config.keys import known_keys
from ringasync.config.load import load_config
from ringasync.config.schema import Config, DataConfig, TaskConfig
from ringasync.config.template import config_template
from ringasync.errors import ConfigError

TASK = TaskConfig(name="equations", kind="mathematics", dataset="linear_equation")
DEFAULTS = Config(data=DataConfig(tasks=(TASK,)))


def loaded(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "new.toml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


def test_new_file_loads_to_the_defaults(tmp_path: Path) -> None:
    init(tmp_path / "new.toml")
    assert load_config(tmp_path / "new.toml") == DEFAULTS


def test_values_shown_are_the_defaults(tmp_path: Path) -> None:
    """With every setting taken out of its comment."""
    text, num_settings = re.subn(r"^#(?=\w+ = )", "", config_template(), flags=re.MULTILINE)
    assert num_settings > 100
    assert loaded(tmp_path, text) == DEFAULTS


def test_every_setting_is_there_below_its_section() -> None:
    section, found = "", []
    for line in config_template().splitlines():
        if header := re.fullmatch(r"\[+([\w.]+)\]+", line):
            section = header[1].replace("data.tasks", "data.tasks.*")
        elif setting := re.match(r"#?(\w+) = |# (\w+) is left out$", line):
            found.append(f"{section}.{setting[1] or setting[2]}")
    assert sorted(found) == sorted(known_keys())


def test_explanations_of_the_schema_are_in_it() -> None:
    text = config_template()
    assert "# A session without heartbeat for this long is dead; its leases return." in text
    assert "# a whole number, at least 200\n#session_ttl_ms = 5000" in text


def test_what_is_there_is_kept_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="is there already; --force overwrites it"):
        init(path)
    assert path.read_text() == "mine"
    init(path, force=True)
    assert path.read_text() == config_template()


@pytest.mark.parametrize("name", ["", "none/new.toml"])
def test_place_that_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / name))):
        init(tmp_path / name, force=True)


def test_command_names_the_next_step(tmp_path: Path) -> None:
    path = tmp_path / "new.toml"
    answer = CliRunner().invoke(app, ["init", str(path)])
    assert answer.output.replace("\n", "") == (
        f"{path}: written; next: ringasync config --check {path}"
    )
