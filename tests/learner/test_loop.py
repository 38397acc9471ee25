"""The loop end to end: a real Redis, a learner process, groups fed and graded by hand."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from learner.backends.base import ScoredSequence
from learner.backends.torch_backend import TorchBackend, TorchSettings
from learner.outcomes import note_closed_groups
from learner.state import LearnerState
from ringasync.broker.types import NewGroup, VersionInfo
from ringasync.weights.manifest import load_manifest

from ..conftest import RedisServer
from .checkpoint_kit import newest_checkpoint
from .kit import Feeder, LearnerProcess, check_ledger, config_path, write_config

STEPS = 5
GROUPS = 14  # 14 x 4 rollouts of about 15 tokens: more than five budgets of 120


def check_probe(feeder: Feeder, latest: VersionInfo) -> None:
    """The canary holds the log-probs that the published folder gives, not those before the step."""
    manifest = load_manifest(latest.manifest)
    assert len(manifest.probe) == 2
    folder = feeder.config.run_dir / "weights" / manifest.location
    settings = TorchSettings(feeder.config.learner, feeder.config.loss)
    backend = TorchBackend.from_pretrained(str(folder), settings)
    scored = backend.logprobs(
        [ScoredSequence(one.prompt_ids, one.token_ids) for one in manifest.probe], temperature=1.0
    )
    for one, values in zip(manifest.probe, scored, strict=True):
        np.testing.assert_allclose(values, one.logprobs, atol=1e-5)


async def test_trains_to_the_end(feeder: Feeder, tmp_path: Path, any_redis: RedisServer) -> None:
    await feeder.feed(GROUPS)
    learner = LearnerProcess.start(config_path(feeder), any_redis.url)
    assert await learner.wait() == 0, learner.log()
    await check_ledger(feeder, STEPS * 120)
    assert newest_checkpoint(feeder).meta.step == STEPS
    latest = await feeder.broker.version()
    assert latest is not None
    assert (latest.version, latest.learner_step) == (STEPS + 1, STEPS)
    check_probe(feeder, latest)
    metrics = [row for _, row in await feeder.broker.read_metrics("0", 100)]
    assert [row["step"] for row in metrics] == list(range(1, STEPS + 1))
    assert all(row["budget_fill"] == 1.0 and row["role"] == "learner" for row in metrics)
    assert metrics[0]["staleness_tokens"] == {"0": 120}
    assert all(row["train_tflop"] > 0 for row in metrics)
    assert all(row["announce_s"] > 0 for row in metrics)
    # A median takes five norms before it.
    assert all(row["grad_norm_spike"] == 0 and row["grad_norm_median"] is None for row in metrics)
    assert [session["role"] for session in await feeder.broker.sessions()] == ["worker"]


async def test_spikes_are_reported_and_extra_terms_are_in_the_metrics(
    any_redis: RedisServer, tmp_path: Path, model_dir: Path, run_name: str
) -> None:
    path = write_config(tmp_path, run_name, model_dir, steps=7)
    text = path.read_text(encoding="utf-8")
    # Every norm is above a tenth of the median: each is a spike, once there is a median.
    text = text.replace(
        "[learner]\n", '[learner]\ngrad_spike_factor = 0.1\nlr_schedule = "linear"\n'
    )
    path.write_text(text + "[loss]\nkl_coef = 0.01\nentropy_coef = 0.01\n", encoding="utf-8")
    feeder = await Feeder.make(any_redis.url, path)
    try:
        await feeder.feed(20)
        learner = LearnerProcess.start(path, any_redis.url)
        assert await learner.wait() == 0, learner.log()
        rows = [row for _, row in await feeder.broker.read_metrics("0", 100)]
    finally:
        await feeder.close()
    assert [row["grad_norm_spike"] for row in rows] == [0] * 5 + [1] * 2
    norms = [row["grad_norm"] for row in rows]
    assert rows[5]["grad_norm_median"] == pytest.approx(float(np.median(norms[:5])))
    assert learner.log().count("gradient norm far above") == 2
    # Two updates of warm-up, then a fall that would end one update after the last.
    expected = [1e-3 * part / 6 for part in (3, 6, 5, 4, 3, 2, 1)]
    assert [row["lr"] for row in rows] == pytest.approx(expected)
    assert rows[0]["kl_reference"] == 0.0
    assert all(row["kl_reference"] > 0 for row in rows[1:])
    for row in rows:
        extra = 0.01 * row["kl_reference"] - 0.01 * row["entropy_bonus"]
        assert row["loss"] == pytest.approx(row["loss_policy"] + extra, abs=1e-6)


async def test_a_replaced_rollout_does_not_close_its_prompt(feeder: Feeder) -> None:
    """Only a whole group's end may move the data position: its prompt is never fed again."""
    broker, coordinator = feeder.broker, feeder.coordinator
    groups = [
        NewGroup(f"p{i}", "train", "d", "p", (1,), {}, i, 2, 8, "bad" if i == 0 else "")
        for i in range(3)
    ]
    await broker.feed(coordinator, "p", groups, "c")
    await broker.purge(coordinator, "q", -1, "replace")  # every rollout is replaced
    await broker.end_group(coordinator, "p2", "purged", "a test")
    state = LearnerState()
    await note_closed_groups(broker, state)
    assert [state.position.is_closed(i) for i in range(3)] == [True, False, True]


CRASHES = (
    "reserved:1",
    "journalled:1",
    "committed:2",
    "stepping:2",
    "stepped:1",
    "marked:4",
    "checkpoint_staged:3",
    "checkpoint_half_written",
    "checkpointing:3",
    "checkpointed:3",
    "publishing:2",
    "published:4",
)


@dataclass
class Reference:
    """What the uninterrupted run came to."""

    state: dict[str, torch.Tensor] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)


@pytest.fixture(scope="module")
def reference() -> Reference:
    """Filled by the first test of the module."""
    return Reference()


async def run_uninterrupted(
    reference: Reference, url: str, tmp_path: Path, model_dir: Path
) -> None:
    if not reference.state:
        path = write_config(tmp_path, f"ref-{tmp_path.name}"[:60], model_dir)
        feeder = await Feeder.make(url, path)
        await feeder.feed(GROUPS)
        learner = LearnerProcess.start(path, url)
        assert await learner.wait() == 0, learner.log()
        reference.state = newest_checkpoint(feeder).tensors
        reference.losses = {row["step"]: row["loss"] for row in await feeder.metrics()}
        await feeder.close()


@pytest.mark.parametrize("crash_at", CRASHES)
async def test_killed_learner_goes_on_exactly(
    crash_at: str,
    feeder: Feeder,
    tmp_path: Path,
    any_redis: RedisServer,
    model_dir: Path,
    reference: Reference,
) -> None:
    await run_uninterrupted(reference, any_redis.url, tmp_path, model_dir)
    await feeder.feed(GROUPS)
    path = config_path(feeder)
    killed = LearnerProcess.start(path, any_redis.url, crash_at=crash_at)
    assert await killed.wait() == -signal.SIGKILL, killed.log()
    assert (await feeder.broker.audit()).balanced
    successor = LearnerProcess.start(path, any_redis.url)
    assert await successor.wait() == 0, successor.log()
    await check_ledger(feeder, STEPS * 120)
    final = newest_checkpoint(feeder).tensors
    assert final.keys() == reference.state.keys()
    for name, tensor in final.items():
        assert torch.equal(tensor, reference.state[name]), name
    rows = await feeder.metrics()
    assert rows[-1]["step"] == STEPS
    for row in rows:  # also those that were trained twice, before and after the kill
        assert row["loss"] == reference.losses[row["step"]], row["step"]
    assert not list((feeder.config.run_dir / "checkpoints").glob(".tmp-*"))
