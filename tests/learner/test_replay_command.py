"""``ringasync replay``: a learner's real journal, trained again without Redis."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from learner.journal_files import list_files, read_frames
from learner.replay import ReplayOptions, replay
from ringasync.config.load import config_hash, resolved_json
from ringasync.coordinator.metrics_file import encode_line
from ringasync.errors import CheckpointError, ConfigError, JournalError
from ringasync.runtime.replay import CHANGEABLE, replay_settings
from ringasync.runtime.runfiles import RunRecord

from ..conftest import RedisServer
from .kit import Feeder, LearnerProcess, write_config
from .moe_kit import tiny_moe

ROOT = Path(__file__).parents[2]
STEPS = 5
OF_THE_RUN = {"role", "stream", "replayed", "step_s", "tokens_per_s"} | {
    "announce_s",
    "checkpoint_step",
    "checkpoints_failed",
    "grad_norm_spike",  # of the learner's own window of norms
    "grad_norm_median",
    "train_tflop",
    "mfu",
}
"""What a step's line has that a replay does not, or not the same."""
REPLAY_OF_EXPERTS = """
[worker]
engine = "vllm"
[loss]
routing_replay = true
"""


async def live(feeder: Feeder, config_path: Path, redis: RedisServer, crash_at: str) -> None:
    """Train to the end with a kill on the way, and leave what ``up`` and the recorder leave."""
    killed = LearnerProcess.start(config_path, redis.url, crash_at=crash_at)
    assert await killed.wait() < 0, killed.log()
    learner = LearnerProcess.start(config_path, redis.url)
    assert await learner.wait() == 0, learner.log()
    config = feeder.config
    lines = [{"kind": "step", "stream": "metrics", **row} for row in await feeder.metrics()]
    (config.run_dir / "metrics.jsonl").write_bytes(b"".join(map(encode_line, lines)))
    (config.run_dir / "config.json").write_text(resolved_json(config))
    record = RunRecord(
        config.run.name, str(config_path), config_hash(config), redis.url, config.model.path
    )
    record.write(config.run_dir)
    await feeder.close()


@pytest.fixture(scope="module")
def recorded(
    any_redis: RedisServer, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of five steps in two lives, checkpoints after the third and the fifth."""
    directory = tmp_path_factory.mktemp("recorded")
    path = write_config(directory, "replayed", model_dir, steps=STEPS)

    async def main() -> None:
        feeder = await Feeder.make(any_redis.url, path)
        await feeder.feed(14)
        await live(feeder, path, any_redis, "marked:1")

    asyncio.run(main())
    return directory / "runs" / "replayed"


@pytest.fixture
def run_dir(recorded: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be damaged or not."""
    copy = tmp_path / "runs" / "replayed"
    shutil.copytree(recorded, copy)
    return copy


def content(run_dir: Path) -> dict[str, str]:
    """Hashes of all of the run's own files."""
    return {
        str(path.relative_to(run_dir)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run_dir.rglob("*"))
        if path.is_file() and "replay" not in path.relative_to(run_dir).parts
    }


def lines_of(run_dir: Path, label: str) -> list[dict[str, Any]]:
    text = (run_dir / "replay" / label / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def summary_of(run_dir: Path, label: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "replay" / label / "summary.json").read_text())
    return found


def recorded_lines(run_dir: Path) -> dict[int, dict[str, Any]]:
    text = (run_dir / "metrics.jsonl").read_text()
    return {line["step"]: line for line in map(json.loads, text.splitlines())}


def test_a_replay_from_the_start_is_the_run_bit_for_bit(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(run_dir)
    assert replay(ReplayOptions(run_dir)) == 0
    assert content(run_dir) == before
    lines, run = lines_of(run_dir, "as-recorded"), recorded_lines(run_dir)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    for line in lines:
        own = run[line["step"]]
        same = {*own} - OF_THE_RUN
        for key in (key for key in same if not key.startswith("time_")):
            assert line[key] == own[key], key
        assert line["recorded_loss"] == own["loss"]
        assert line["loss_difference"] == 0
        assert line["time_train_s"] > 0
    assert any(line["num_carried_in"] for line in lines)
    summary = summary_of(run_dir, "as-recorded")
    assert summary["losses_agree"]
    assert summary["rule"].startswith("must be equal")
    assert summary["steps"] == summary["steps_compared"] == STEPS
    assert summary["mask_rate_mean_recorded"] == summary["mask_rate_mean_replayed"]
    out = capsys.readouterr().out
    assert "5 steps from the starting model (version 1)" in out
    assert "step 5: loss" in out
    assert "mean mask rate" in out


@pytest.mark.parametrize(("version", "step"), [(4, 3), (5, 3)])
def test_a_replay_from_a_checkpoint_is_the_run_bit_for_bit(
    run_dir: Path, capsys: pytest.CaptureFixture[str], version: int, step: int
) -> None:
    (of_checkpoint,) = (one for one in (run_dir / "checkpoints").iterdir() if "0003-" in one.name)
    assert json.loads((of_checkpoint / "meta.json").read_text())["policy_version"] <= version
    before = content(run_dir)
    assert replay(ReplayOptions(run_dir, from_version=version, label="late")) == 0
    assert content(run_dir) == before
    assert [line["step"] for line in lines_of(run_dir, "late")] == [4, 5]
    assert summary_of(run_dir, "late")["losses_agree"]
    assert f"from the checkpoint of step {step} (version 4)" in capsys.readouterr().out


def test_below_all_checkpoints_it_begins_at_the_starting_model(run_dir: Path) -> None:
    assert replay(ReplayOptions(run_dir, from_version=2, steps=2)) == 0
    assert [line["step"] for line in lines_of(run_dir, "as-recorded")] == [1, 2]
    assert "starting model" in summary_of(run_dir, "as-recorded")["began_at"]


def test_a_changed_correction_gives_other_losses_and_no_failure(run_dir: Path) -> None:
    overrides = ("loss.mismatch=tis", "loss.tis_cap=0.9")
    assert replay(ReplayOptions(run_dir, overrides)) == 0
    label = "loss.mismatch=tis_loss.tis_cap=0.9"
    lines, run = lines_of(run_dir, label), recorded_lines(run_dir)
    assert all(
        line["loss_difference"] == line["loss"] - run[line["step"]]["loss"] for line in lines
    )
    assert all(line["loss_difference"] for line in lines)
    summary = summary_of(run_dir, label)
    assert summary["changed"] == {"loss.mismatch": "tis", "loss.tis_cap": 0.9}
    assert summary["was"] == {"loss.mismatch": "icepop", "loss.tis_cap": 2.0}
    assert summary["first_differing_step"] == 1
    assert summary["mask_rate_mean_replayed"] == 0
    assert replay(ReplayOptions(run_dir, ("loss.mask_low=0.97",), steps=2, label="narrow")) == 0
    narrow = summary_of(run_dir, "narrow")
    assert narrow["mask_rate_mean_replayed"] > narrow["mask_rate_mean_recorded"]


@pytest.mark.parametrize(
    "override",
    [
        "learner.microbatch_tokens=64",
        "learner.packing=off",
        "learner.activation_checkpointing=true",
        "learner.logprob_chunk_tokens=16",
    ],
)
def test_another_order_of_sums_is_held_to_a_tolerance(run_dir: Path, override: str) -> None:
    assert replay(ReplayOptions(run_dir, (override,), steps=2, label="other")) == 0
    summary = summary_of(run_dir, "other")
    assert list(summary["changed"]) == [override.partition("=")[0]]
    assert summary["rule"].startswith("must agree to 1e-05")
    assert summary["losses_agree"]


def test_another_loss_with_the_run_s_settings_is_a_failure(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = recorded_lines(run_dir)
    lines[3]["loss"] *= 1 + 1e-12
    (run_dir / "metrics.jsonl").write_bytes(b"".join(map(encode_line, lines.values())))
    assert replay(ReplayOptions(run_dir)) == 1
    assert "the replay is not the run: step 3: loss" in capsys.readouterr().err
    assert summary_of(run_dir, "as-recorded")["first_differing_step"] == 3
    for line in lines.values():
        del line["arithmetic"]  # as releases before this one wrote it
    (run_dir / "metrics.jsonl").write_bytes(b"".join(map(encode_line, lines.values())))
    assert replay(ReplayOptions(run_dir)) == 0


def test_without_metrics_nothing_was_compared(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "metrics.jsonl").unlink()
    assert replay(ReplayOptions(run_dir, steps=1)) == 1
    assert "nothing was compared" in capsys.readouterr().err


def last_file(run_dir: Path) -> Path:
    return list_files(run_dir / "journal")[-1].path


def tear(run_dir: Path) -> None:
    path = last_file(run_dir)
    os.truncate(path, path.stat().st_size - 10)


def damage(run_dir: Path) -> None:
    """A byte of the first batch in the last life's file: whole batches follow."""
    file = list_files(run_dir / "journal")[-1]
    _, first, *more = read_frames(file, None, file.base)
    assert more
    data = bytearray(file.path.read_bytes())
    data[first.end - file.base - 1] ^= 1
    file.path.write_bytes(data)


def lose_the_first_file(run_dir: Path) -> None:
    list_files(run_dir / "journal")[0].path.unlink()


def lose_all(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "journal")


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (tear, r"ends after batch b00000003-\S+ of step 4.*batch b00000004-\S+ of step 5 is torn"),
        (damage, r"damaged at byte .*the last whole batch before is b00000001-\S+ of step 2"),
        (lose_the_first_file, "expected 0: no whole batch comes before"),
        (lose_all, "no journal here"),
    ],
)
def test_a_broken_journal_is_named(run_dir: Path, harm: Callable[[Path], None], says: str) -> None:
    harm(run_dir)
    with pytest.raises(JournalError, match=says):
        replay(ReplayOptions(run_dir))
    assert not (run_dir / "replay").exists()


def test_what_is_whole_of_a_torn_journal_can_be_replayed(run_dir: Path) -> None:
    tear(run_dir)
    before = content(run_dir)
    assert replay(ReplayOptions(run_dir, steps=STEPS - 1)) == 0
    assert content(run_dir) == before


@pytest.mark.parametrize("version", [0, 99])
def test_a_version_that_never_was_lists_the_checkpoints(run_dir: Path, version: int) -> None:
    with pytest.raises(ConfigError, match=r"1 \(the starting model\) to \d+; .*4 \(step 3\), "):
        replay(ReplayOptions(run_dir, from_version=version))


def test_nothing_is_left_behind_the_last_checkpoint(run_dir: Path) -> None:
    newest = max(line["policy_version"] for line in recorded_lines(run_dir).values())
    with pytest.raises(ConfigError, match="journal ends at step 5, and so does the checkpoint"):
        replay(ReplayOptions(run_dir, from_version=newest))


def test_a_damaged_checkpoint_is_named(run_dir: Path) -> None:
    for path in (run_dir / "checkpoints").glob("*0003-*/tensors/*.distcp"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint can be used: step00000003"):
        replay(ReplayOptions(run_dir, from_version=4))


@pytest.mark.parametrize(
    "override",
    ["model.dtype=bfloat16", "data.template=x {prompt}", "loss.advantage_std=false", "run.seed=9"],
)
def test_settings_that_are_in_the_journal_cannot_be_changed(run_dir: Path, override: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(
        ConfigError, match=f"{key}: cannot be changed .*loss.mismatch, .*learner.lr"
    ):
        replay_settings(run_dir, [override])


def test_every_changeable_setting_exists(run_dir: Path) -> None:
    data = replay_settings(run_dir, ()).config.model_dump()
    assert all(leaf in data[section] for section, leaf in (key.split(".") for key in CHANGEABLE))


def test_recorded_experts_are_replayed(
    any_redis: RedisServer, tmp_path: Path, run_name: str
) -> None:
    tiny_moe().save_pretrained(tmp_path / "moe")
    path = write_config(tmp_path, run_name, tmp_path / "moe", steps=3)
    path.write_text(path.read_text() + REPLAY_OF_EXPERTS)

    async def main() -> None:
        feeder = await Feeder.make(any_redis.url, path)
        feeder.routed_shape = (2, 2, 4)
        await feeder.feed(9)
        await live(feeder, path, any_redis, "committed:1")

    asyncio.run(main())
    run_dir = tmp_path / "runs" / run_name
    assert replay(ReplayOptions(run_dir)) == 0
    lines = lines_of(run_dir, "as-recorded")
    assert [line["loss_difference"] for line in lines] == [0, 0, 0]
    assert all(line["routing_replayed_share"] == 1 for line in lines)
    assert replay(ReplayOptions(run_dir, ("loss.routing_replay=false",))) == 0
    assert lines_of(run_dir, "loss.routing_replay=False")[0]["loss_difference"] != 0


def command(run_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``ringasync replay`` from another folder, told of no Redis that answers."""
    return subprocess.run(
        [sys.executable, "-m", "ringasync", "replay", *arguments],
        cwd=run_dir.parents[1],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "RINGASYNC_REDIS_URL": "redis://127.0.0.1:1/0",
            "COLUMNS": "120",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_replays_a_run_by_name_without_redis(run_dir: Path) -> None:
    before = content(run_dir)
    done = command(run_dir, "replayed", "--from", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "replay of replayed: 2 steps from the checkpoint of step 3" in done.stdout
    assert "largest |loss difference|" in done.stdout
    assert done.stderr == ""
    assert content(run_dir) == before
    assert summary_of(run_dir, "as-recorded")["losses_agree"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nobody"], "no run 'nobody' in runs/ (there: replayed)"),
        (["replayed", "--set", "model.path=x"], "model.path: cannot be changed in a replay"),
        (["replayed", "--set", "loss.mismatch=tiss"], "loss.mismatch"),
        (["replayed", "--label", "../x"], "--label '../x': must be"),
    ],
)
def test_a_wrong_command_line_is_refused_at_once(
    run_dir: Path, arguments: list[str], says: str
) -> None:
    done = command(run_dir, *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert says in done.stderr
    assert not (run_dir / "replay").exists()
