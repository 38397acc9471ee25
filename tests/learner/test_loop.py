"""The loop end to end: a real Redis, a learner process, groups fed and graded by hand."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch

from learner.checkpoint import Checkpoint, load_latest
from learner.journal import Journal
from ringasync.weights.manifest import load_manifest

from ..conftest import RedisServer
from .kit import Feeder, LearnerProcess, until, write_config

STEPS = 5
GROUPS = 14  # 14 x 4 rollouts of about 15 tokens: more than five budgets of 120


@pytest.fixture
async def feeder(
    any_redis: RedisServer, tmp_path: Path, model_dir: Path, run_name: str
) -> AsyncIterator[Feeder]:
    made = await Feeder.make(any_redis.url, write_config(tmp_path, run_name, model_dir))
    yield made
    await made.close()


def config_path(tmp_path: Path, feeder: Feeder) -> Path:
    return tmp_path / f"{feeder.config.run.name}.toml"


def final_checkpoint(feeder: Feeder) -> Checkpoint:
    checkpoint = load_latest(
        feeder.config.run_dir / "checkpoints",
        feeder.config.run.name,
        accept=lambda _meta: True,
        warn=print,
    )
    assert checkpoint is not None
    return checkpoint


async def check_ledger(feeder: Feeder) -> None:
    """Audit balanced, and the journal trains every token at most once, as Redis counts it."""
    audit = await feeder.broker.audit()
    assert audit.balanced, (audit.differences, audit.problems)
    journal = Journal.open(feeder.config.run_dir / "journal", feeder.config.run.name, fence=99)
    trained: dict[str, int] = {}
    masked = 0
    for _, record in journal.read():
        for one in record.order:
            assert one.rollout_id not in trained, f"{one.rollout_id} was trained twice"
            trained[one.rollout_id] = one.trained_tokens
            masked += one.masked_tokens
            assert one.trained_tokens + one.masked_tokens == feeder.tokens[one.rollout_id]
    journal.close()
    ledger = await feeder.broker.ledger()
    assert ledger["trained"] == sum(trained.values()) == STEPS * 120
    assert ledger["masked"] == masked
    assert ledger["accepted"] == sum(feeder.tokens.values())


async def test_trains_to_the_end(feeder: Feeder, tmp_path: Path, any_redis: RedisServer) -> None:
    await feeder.feed(GROUPS)
    learner = LearnerProcess.start(config_path(tmp_path, feeder), any_redis.url)
    assert await learner.wait() == 0, learner.log()
    await check_ledger(feeder)
    assert final_checkpoint(feeder).meta.step == STEPS
    latest = await feeder.broker.version()
    assert latest is not None
    assert (latest.version, latest.learner_step) == (STEPS + 1, STEPS)
    assert len(load_manifest(latest.manifest).probe) == 2
    metrics = [row for _, row in await feeder.broker.read_metrics("0", 100)]
    assert [row["step"] for row in metrics] == list(range(1, STEPS + 1))
    assert all(row["budget_fill"] == 1.0 and row["role"] == "learner" for row in metrics)
    assert metrics[0]["staleness_tokens"] == {"0": 120}
    assert [session["role"] for session in await feeder.broker.sessions()] == ["worker"]


CRASHES = (
    "reserved:1",
    "journalled:1",
    "committed:2",
    "stepped:1",
    "marked:4",
    "checkpointing:3",
    "checkpointed:3",
    "publishing:2",
    "published:4",
)


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    """Filled by the first test of the module: final state of the uninterrupted run."""
    return {}


async def reference_state(
    reference: dict[str, torch.Tensor], url: str, tmp_path: Path, model_dir: Path
) -> dict[str, torch.Tensor]:
    if not reference:
        path = write_config(tmp_path, f"ref-{tmp_path.name}"[:60], model_dir)
        feeder = await Feeder.make(url, path)
        await feeder.feed(GROUPS)
        learner = LearnerProcess.start(path, url)
        assert await learner.wait() == 0, learner.log()
        reference.update(final_checkpoint(feeder).tensors)
        await feeder.close()
    return reference


@pytest.mark.parametrize("crash_at", CRASHES)
async def test_killed_learner_goes_on_exactly(
    crash_at: str,
    feeder: Feeder,
    tmp_path: Path,
    any_redis: RedisServer,
    model_dir: Path,
    reference: dict[str, torch.Tensor],
) -> None:
    expected = await reference_state(reference, any_redis.url, tmp_path, model_dir)
    await feeder.feed(GROUPS)
    path = config_path(tmp_path, feeder)
    killed = LearnerProcess.start(path, any_redis.url, crash_at=crash_at)
    assert await killed.wait() == -signal.SIGKILL, killed.log()
    assert (await feeder.broker.audit()).balanced
    successor = LearnerProcess.start(path, any_redis.url)
    assert await successor.wait() == 0, successor.log()
    await check_ledger(feeder)
    final = final_checkpoint(feeder).tensors
    assert final.keys() == expected.keys()
    for name, tensor in final.items():
        assert torch.equal(tensor, expected[name]), name


async def test_first_signal_checkpoints_and_frees_the_lock(
    feeder: Feeder, tmp_path: Path, any_redis: RedisServer
) -> None:
    await feeder.feed(5)
    path = config_path(tmp_path, feeder)
    learner = LearnerProcess.start(path, any_redis.url)

    async def idle() -> bool:
        return int((await feeder.broker.run_meta())["learner_step"]) >= 2

    await until(idle, "two steps")
    learner.process.terminate()
    assert await learner.wait() == 0, learner.log()
    step = final_checkpoint(feeder).meta.step
    assert step == int((await feeder.broker.run_meta())["learner_step"])
    fence = await feeder.broker.acquire_lock("learner", "test", 1000)
    await feeder.broker.release_lock(fence)
