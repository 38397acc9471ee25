"""What a replay of a run's journal may change, and how its process is started."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringasync.config.load import config_from_json, with_overrides
from ringasync.config.schema import RUN_NAME_PATTERN, Config
from ringasync.errors import ConfigError
from ringasync.runtime.roles import REPLAY_MODULE, override_arguments
from ringasync.runtime.runfiles import SETTINGS_FILE

ROUNDING = (
    *("learner.microbatch_tokens", "learner.logprob_chunk_tokens", "learner.packing"),
    *("learner.activation_checkpointing", "learner.compile", "learner.attention_kernel"),
    *("learner.device", "learner.threads"),
)
"""The same mathematics; only the order of sums differs."""

CHANGEABLE = (
    *("loss.mismatch", "loss.mask_low", "loss.mask_high", "loss.tis_cap", "loss.kpop_phi"),
    *("loss.clip_low", "loss.clip_high", "loss.normalizer", "loss.routing_replay"),
    *("learner.lr", "learner.warmup_steps", "learner.betas", "learner.weight_decay"),
    *("learner.grad_clip", "learner.updates_per_batch", "learner.freeze_router"),
    "learner.residual_dtype",
    *ROUNDING,
)
"""Settings of the update alone. All others decided what was generated, graded and selected, and
that is in the journal, advantages (``loss.advantage_std``) included."""

AS_RECORDED = "as-recorded"
_MAX_LABEL_CHARS = 64


@dataclass(frozen=True, slots=True)
class ReplaySettings:
    """A run's configuration with the overrides.

    ``changed`` maps the dotted keys that differ to their new values, ``was`` to the run's.
    """

    config: Config
    changed: Mapping[str, Any]
    was: Mapping[str, Any]

    @property
    def is_comparison(self) -> bool:
        """Whether another mathematics was asked for, so that losses are expected to differ."""
        return any(key not in ROUNDING for key in self.changed)

    @property
    def default_label(self) -> str:
        """A folder name that says what was changed."""
        parts = [f"{key}={value}" for key, value in self.changed.items()]
        text = re.sub(r"[^A-Za-z0-9._=-]+", "-", "_".join(parts) or AS_RECORDED)
        return text[:_MAX_LABEL_CHARS].rstrip("-")


def replay_settings(run_dir: Path, overrides: Sequence[str]) -> ReplaySettings:
    """The settings that the run in ``run_dir`` had, with ``key=value`` overrides.

    Raises:
        ConfigError: they are not there, an override is wrong, or it is of no use in a replay.
    """
    path = run_dir / SETTINGS_FILE
    try:
        recorded = config_from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}): `ringasync up` writes it when the run "
            "begins, and without it the run's settings are not known"
        ) from None
    config = with_overrides(recorded, overrides, path)
    before, after = (_flat(each.model_dump(mode="json")) for each in (recorded, config))
    changed = {key: value for key, value in after.items() if before.get(key, ...) != value}
    fixed = [key for key in changed if key not in CHANGEABLE]
    if fixed:
        raise ConfigError(
            f"{', '.join(fixed)}: cannot be changed in a replay, because the journal holds what "
            f"the run generated and selected with it. Can be changed: {', '.join(CHANGEABLE)}"
        )
    return ReplaySettings(config, changed, {key: before[key] for key in changed})


def check_label(label: str) -> str:
    """The label if it can be a folder's name; else raises ``ConfigError``."""
    if not re.match(RUN_NAME_PATTERN.replace("._-", "._=-"), label):
        raise ConfigError(
            f"--label {label!r}: must be 1 to 64 letters, digits, '.', '_', '=' or '-', and begin "
            "with a letter or a digit"
        )
    return label


def replay_command(
    run_dir: Path,
    overrides: Sequence[str],
    *,
    from_version: int | None,
    steps: int | None,
    label: str,
    model: str,
) -> tuple[str, ...]:
    """The command that replays the run; the interpreter is this one."""
    command = [sys.executable, "-m", REPLAY_MODULE, str(run_dir), *override_arguments(overrides)]
    given = {"--from": from_version, "--steps": steps, "--label": label, "--model": model}
    for option, value in given.items():
        if value not in (None, ""):
            command += [option, str(value)]
    return tuple(command)


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key; lists are values."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
