"""Memory that runs out in a step: said with the remedies, nothing lost, resumed with one."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from learner.launch import first_to_go
from ringasync.errors import StepMemoryError

from ..conftest import RedisServer
from .backend_contract import learner_config
from .checkpoint_kit import newest_checkpoint
from .kit import (
    Feeder,
    LearnerProcess,
    check_ledger,
    config_path,
    tiny_backend,
    toy_batch,
    until,
    write_config,
)
from .ranked_learner import CANCELLED, RankedLearner, begin_training

_VOCAB = 250_000
"""Logits of a micro-batch of this model take 100 MB and more, twice in a step; all else of it, with
a checkpoint's copies and what differs from process to process, stays below ``ROOM_BYTES``."""
ROOM_BYTES = 120 << 20
REMEDY = ("learner.logprob_chunk_tokens=4", "learner.microbatch_tokens=64")


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=_VOCAB,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("wide")
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def leave_room(pid: int, room_bytes: int = ROOM_BYTES) -> int:
    """Let the process have so much more main memory than now; returns the limit in bytes."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    found = re.search(r"VmData:\s+(\d+) kB", text)
    assert found is not None
    limit = (int(found[1]) << 10) + room_bytes
    resource.prlimit(pid, resource.RLIMIT_DATA, (limit, limit))
    return limit


async def wide_run(url: str, directory: Path, name: str, model: Path) -> Feeder:
    """A run whose steps need more than ``ROOM_BYTES``: all logits of a micro-batch at once."""
    path = write_config(directory, name, model, steps=3)
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("[learner]\n", "[learner]\nlogprob_chunk_tokens = 0\n"))
    return await Feeder.make(url, path)


async def losses_of(feeder: Feeder) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in await feeder.metrics()}


async def test_a_step_out_of_memory_is_said_and_goes_on_with_a_remedy(
    any_redis: RedisServer, tmp_path: Path, wide_model: Path, run_name: str
) -> None:
    reference = await wide_run(any_redis.url, tmp_path, f"{run_name}-ref", wide_model)
    await reference.feed(8)
    unlimited = LearnerProcess.start(config_path(reference), any_redis.url)
    assert await unlimited.wait() == 0, unlimited.log()
    expected = await losses_of(reference)
    await reference.close()

    feeder = await wide_run(any_redis.url, tmp_path, run_name, wide_model)
    await feeder.feed(3)
    learner = LearnerProcess.start(config_path(feeder), any_redis.url)
    await feeder.reached(1)
    await feeder.published(2)
    assert learner.process.pid is not None
    limit = leave_room(learner.process.pid)
    await feeder.feed(5)
    assert await learner.wait() == StepMemoryError.exit_code, learner.log()
    said = learner.log()
    assert re.search(r"its largest micro-batch has \d+ tokens in \d+ sequences", said), said
    for remedy in (
        "lower learner.microbatch_tokens (now 128)",
        "lower learner.logprob_chunk_tokens (now 0, all at once)",
        "set learner.activation_checkpointing = true",
        "raise learner.ranks (now 1)",
        "Nothing is lost",
    ):
        assert remedy in said
    assert "Traceback" not in said

    overrides = [part for one in REMEDY for part in ("--set", one)]
    again = LearnerProcess.start(config_path(feeder), any_redis.url, extra=overrides)
    assert again.process.pid is not None
    resource.prlimit(again.process.pid, resource.RLIMIT_DATA, (limit, limit))
    assert await again.wait() == 0, again.log()
    assert newest_checkpoint(feeder).meta.step == 3
    assert await losses_of(feeder) == pytest.approx(expected, rel=1e-5, abs=CANCELLED)
    await check_ledger(feeder, 3 * 120)
    await feeder.close()


async def test_one_rank_out_of_memory_ends_the_job_with_its_message(
    any_redis: RedisServer,
    tmp_path: Path,
    wide_model: Path,
    run_name: str,
    started: list[RankedLearner],
) -> None:
    feeder = await wide_run(any_redis.url, tmp_path, run_name, wide_model)
    await feeder.feed(3)
    learner = await begin_training(feeder, any_redis.url, started, 1)
    await feeder.published(2)
    leave_room(learner.ranks[1].pid, ROOM_BYTES // 2)
    await feeder.feed(5)

    async def over() -> bool:
        return learner.process.poll() is not None

    await until(over, f"the end of the step:\n{learner.log()}")
    assert await learner.ended() == StepMemoryError.exit_code, learner.log()
    said = learner.log()
    last = f"learner rank 1 (pid {learner.ranks[1].pid}) ended: exit code 7; it went first,"
    problem = (
        "with it: StepMemoryError: out of memory in the training step: its largest micro-batch has"
    )
    assert said.splitlines()[-1].startswith(last), said
    assert problem in said.splitlines()[-1]
    overrides = [part for one in REMEDY for part in ("--set", one)]
    again = LearnerProcess.start(config_path(feeder), any_redis.url, extra=overrides)
    assert await again.wait() == 0, again.log()
    await check_ledger(feeder, 3 * 120)
    await feeder.close()


def test_a_rank_with_a_code_of_its_own_went_before_one_that_lost_it() -> None:
    assert first_to_go({0, 1}, {0: 1, 1: 7}) == 1


def test_the_advice_leaves_out_what_is_set_and_what_would_not_help() -> None:
    learner = learner_config(
        microbatch_tokens=8, logprob_chunk_tokens=1, activation_checkpointing=True
    )
    backend = tiny_backend(learner)

    def fails(*_: object) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)  # no address space has that

    layer = next(one for one in backend.model.modules() if "DecoderLayer" in type(one).__name__)
    layer.register_forward_pre_hook(fails)
    before = {name: one.clone() for name, one in backend.state_dict().items()}
    with pytest.raises(StepMemoryError) as raised:
        backend.train_batch(toy_batch(1))
    said = str(raised.value)
    assert "has 10 tokens in 1 sequence (" in said
    assert "DefaultCPUAllocator" in said
    assert "One of: raise learner.ranks (now 1). Nothing is lost" in said
    assert "\n" not in said
    assert all(torch.equal(one, before[name]) for name, one in backend.state_dict().items())
