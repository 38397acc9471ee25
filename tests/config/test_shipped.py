"""Every configuration that ships is accepted, and says what its file name promises."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringasync.config.load import load_config, resolved_toml

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.glob("**/*.toml"))


def test_there_are_configurations() -> None:
    assert {"demo.toml", "rounds.toml", "control.toml"} <= {path.name for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_configuration_is_accepted_and_documented(path: Path) -> None:
    config = load_config(path)
    assert config.run.name == path.stem
    assert f"`{path.name}`" in (CONFIGS / "README.md").read_text(encoding="utf-8")
    assert resolved_toml(config)


def test_control_is_the_demo_without_learning() -> None:
    demo, control = load_config(CONFIGS / "demo.toml"), load_config(CONFIGS / "control.toml")
    assert control.learner.lr == 0.0
    for section in ("model", "starter", "data", "sampling", "schedule", "loss", "eval"):
        assert getattr(control, section) == getattr(demo, section), section


def test_rounds_is_faithful_to_algorithm_1() -> None:
    schedule = load_config(CONFIGS / "rounds.toml").schedule
    assert schedule.mode == "rounds"
    assert schedule.retention_max is not None
