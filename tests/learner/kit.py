"""What learner tests share: a tiny model, hand-made trajectories, a run fed and graded by hand."""

from __future__ import annotations

import asyncio
import multiprocessing
import runpy
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from learner.backends.torch_backend import TorchBackend, TorchSettings
from learner.batch import BatchItem, TrainBatch
from learner.journal import Journal
from ringasync.broker.client import Broker
from ringasync.broker.types import AppendItem, Fence, Lease, NewGroup, Verdict
from ringasync.config.load import config_hash, load_config, resolved_json
from ringasync.config.schema import Config, LearnerConfig, LossConfig
from ringasync.records.routing import RoutedRows
from ringasync.records.segment import encode_segment, policy_segment
from ringasync.records.trajectory import Trajectory

VOCAB = 48
SESSION_TTL_MS = 600_000


def tiny_model(seed: int = 0, *, tied: bool = True) -> torch.nn.Module:
    """A Qwen3 of two layers with head_dim 32, random weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
    )
    model: torch.nn.Module = Qwen3ForCausalLM(config)
    return model


def tiny_backend(
    learner: LearnerConfig | None = None,
    loss: LossConfig | None = None,
    *,
    temperature: float = 1.0,
    seed: int = 0,
) -> TorchBackend:
    """A torch backend on the tiny model."""
    settings = TorchSettings(
        learner or LearnerConfig(lr=1e-3, warmup_steps=0), loss or LossConfig(), temperature
    )
    return TorchBackend(tiny_model(seed), settings)


def trajectory(
    rollout_id: str,
    tokens: int,
    *,
    seed: int = 0,
    reward: float = 1.0,
    logprob: float = -3.9,
    versions: Sequence[int] = (1,),
) -> Trajectory:
    """Random tokens with the log-prob of a uniform choice; versions in equal spans."""
    generator = np.random.default_rng([seed, *rollout_id.encode()])
    spans = np.array_split(np.zeros(tokens, np.int32), len(versions))
    return Trajectory(
        rollout_id=rollout_id,
        group_id=rollout_id.rpartition(".")[0],
        domain="toy",
        prompt_ids=generator.integers(0, VOCAB, 5).astype(np.int32),
        token_ids=generator.integers(0, VOCAB, tokens).astype(np.int32),
        behavior_logprobs=np.full(tokens, logprob, np.float32),
        policy_versions=np.concatenate(
            [span + version for span, version in zip(spans, versions, strict=True)]
        ).astype(np.int32),
        loss_mask=np.ones(tokens, np.bool_),
        reward=reward,
        finish_reason="stop",
    )


def batch_of(items: Sequence[BatchItem], *, step: int = 0, budget: int | None = None) -> TrainBatch:
    """A batch of these items; its budget is their trained tokens unless given."""
    tokens = sum(item.trained_tokens for item in items)
    return TrainBatch(f"b{step}", step, budget or tokens, tuple(items), {1: 0})


def toy_batch(count: int = 6, *, step: int = 0) -> TrainBatch:
    """Trajectories of different lengths with advantages of both signs."""
    items = []
    for index in range(count):
        one = trajectory(f"g{step}.{index}", 5 + 3 * index, seed=step)
        items.append(BatchItem(one, (-1.0) ** index * (1 + 0.1 * index), one.num_tokens))
    return batch_of(items, step=step)


CONFIG = """
[run]
name = "{name}"
dir = "{directory}"
seed = 3
[model]
path = "{model}"
max_model_len_tokens = 64
[[data.tasks]]
name = "toy"
kind = "jsonl"
dataset = "unused.jsonl"
[sampling]
max_new_tokens = 32
[schedule]
mode = "{mode}"
group_size = 4
max_staleness = {max_staleness}
budget.tokens = {budget}
[learner]
steps = {steps}
lr = 1e-3
warmup_steps = 2
microbatch_tokens = 128
checkpoint_every_steps = 3
checkpoint_keep = 2
lock_ttl_ms = 1500
stall_report_s = 0.5
[weights]
probe_sequences = 2
"""


def write_config(directory: Path, name: str, model: Path, **values: object) -> Path:
    """A configuration file of a small run; ``values`` fill the template."""
    filled: dict[str, object] = {
        **{"mode": "pipelined", "steps": 5, "max_staleness": 50, "budget": 120},
        **values,
    }
    path = directory / f"{name}.toml"
    text = CONFIG.format(name=name, directory=directory / "runs", model=model, **filled)
    path.write_text(text, encoding="utf-8")
    return path


@dataclass
class Feeder:
    """Coordinator, worker and grader by hand, on a real broker."""

    broker: Broker
    config: Config
    coordinator: Fence
    session_id: str = "feeder"
    num_groups: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    """Policy tokens appended, by rollout."""
    routed_shape: tuple[int, int, int] | None = None
    """Layers, experts a token, experts: segments carry rows drawn at random."""

    @classmethod
    async def make(cls, url: str, config_path: Path) -> Feeder:
        """Create the run and open a worker's session."""
        config = load_config(config_path)
        broker = await Broker.connect(url, config.run.name)
        await broker.create_run(resolved_json(config), config_hash(config), config.schedule.mode)
        fence = await broker.acquire_lock("coordinator", "test", SESSION_TTL_MS)
        await broker.open_session("feeder", "worker", SESSION_TTL_MS, {"worker": "feeder"})
        return cls(broker, config, fence)

    async def feed(self, count: int, *, versions: Sequence[int] = (1,)) -> list[str]:
        """Feed, generate and grade ``count`` groups; lengths and rewards differ by rollout."""
        groups = [self._new_group() for _ in range(count)]
        await self.broker.feed(self.coordinator, f"feed-{self.num_groups}", groups, "")
        await self.generate(count * self.config.schedule.group_size, versions=versions)
        await self.grade()
        return [group.group_id for group in groups]

    def _new_group(self) -> NewGroup:
        self.num_groups += 1
        number = self.num_groups
        prompt = tuple(int(one) for one in np.random.default_rng(number).integers(0, VOCAB, 4))
        return NewGroup(
            f"g{number:06d}",
            "train",
            "toy",
            "prompt",
            prompt,
            {},
            number - 1,
            self.config.schedule.group_size,
            self.config.sampling.max_new_tokens,
        )

    async def generate(self, count: int, *, versions: Sequence[int] = (1,)) -> None:
        """Lease ``count`` rollouts, append one segment a version, finish them."""
        taken = 0
        while taken < count:
            leases = await self.broker.take(self.session_id, 64, max(versions))
            assert leases, f"only {taken} of {count} rollouts could be leased"
            for lease in leases:
                await self._generate(lease, versions)
            taken += len(leases)

    async def _generate(self, lease: Lease, versions: Sequence[int]) -> None:
        one = trajectory(lease.rollout_id, self.length(lease.rollout_id), versions=versions)
        start = 0
        for version in versions:
            count = int((one.policy_versions == version).sum())
            segment = policy_segment(
                start,
                version,
                one.token_ids[start : start + count].tolist(),
                one.behavior_logprobs[start : start + count].tolist(),
                self._rows(count if start else len(lease.prompt_ids) - 1 + count),
            )
            item = AppendItem(
                lease.rollout_id, lease.token, start, count, count, version, encode_segment(segment)
            )
            assert await self.broker.append_many(self.session_id, [item]) == ["ok"]
            start += count
        self.tokens[lease.rollout_id] = start
        done = (lease.rollout_id, lease.token, "stop", start)
        assert await self.broker.finish_many(self.session_id, [done]) == ["ok"]

    def _rows(self, count: int) -> RoutedRows | None:
        if self.routed_shape is None:
            return None
        layers, chosen, experts = self.routed_shape
        drawn = np.random.default_rng(count).random((count, layers, experts)).argsort(-1)
        return drawn[..., :chosen].astype(np.uint8)

    @staticmethod
    def length(rollout_id: str) -> int:
        """Between 6 and 24 tokens, fixed by the id."""
        group, _, member = rollout_id.rpartition(".")
        return 6 + (7 * int(group[1:]) + 5 * int(member)) % 19

    async def grade(self) -> None:
        """Grade everything that is finished: the reward is fixed by the id, groups never flat."""
        while jobs := await self.broker.take_grading(self.session_id, 64):
            verdicts = [
                Verdict(job.rollout_id, job.token, float(int(job.rollout_id[-1]) % 2))
                for job in jobs
            ]
            await self.broker.grade_many(self.session_id, verdicts, 3, True, 0)

    async def snapshot(self) -> dict[bytes, tuple[bytes, int]]:
        """Every key of the run with its time to live: what an old AOF would bring back."""
        client: Any = self.broker.client
        found = {}
        async for key in client.scan_iter(match=self.broker.keys.prefix + "*"):
            found[key] = (await client.dump(key), max(0, await client.pttl(key)))
        return found

    async def roll_back(self, snapshot: dict[bytes, tuple[bytes, int]]) -> None:
        """Put the run's keys back to an earlier moment in one transaction, as a failover would."""
        client = self.broker.client
        async with client.pipeline(transaction=True) as pipe:
            async for key in client.scan_iter(match=self.broker.keys.prefix + "*"):
                pipe.delete(key)
            for key, (value, ttl_ms) in snapshot.items():
                pipe.restore(key, ttl_ms, value)
            await pipe.execute()

    async def reopen(self) -> None:
        """Open the worker's session again after a new incarnation ended it."""
        self.session_id += "x"
        await self.broker.open_session(self.session_id, "worker", SESSION_TTL_MS, {"worker": "w"})

    async def step(self) -> int:
        """Batches trained, as the broker has it."""
        return int((await self.broker.run_meta())["learner_step"])

    async def reached(self, step: int) -> None:
        """Wait until that many batches are trained."""

        async def there() -> bool:
            return await self.step() >= step

        await until(there, f"step {step}")

    async def published(self, version: int) -> None:
        """Wait until that version is announced."""

        async def there() -> bool:
            return int((await self.broker.run_meta())["latest_version"]) >= version

        await until(there, f"version {version}")

    async def metrics(self) -> list[dict[str, Any]]:
        """All step metrics so far."""
        return [row for _, row in await self.broker.read_metrics("0", 1000)]

    async def close(self) -> None:
        """Delete the run and disconnect."""
        await self.broker.delete_run()
        await self.broker.close()


_CHILD = Path(__file__).with_name("learner_child.py")
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["learner.app", "transformers.models.qwen3.modeling_qwen3"])


@dataclass
class LearnerProcess:
    """A learner as its own process, forked from a server that has torch loaded already."""

    process: ForkServerProcess
    log_path: Path

    @classmethod
    def start(
        cls, config: Path, url: str, *, crash_at: str = "", extra: Sequence[str] = ()
    ) -> LearnerProcess:
        """``python -m learner CONFIG``; killed at ``crash_at`` if given."""
        environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        if crash_at:
            environment["RINGASYNC_CRASH_AT"] = crash_at
        log_path = config.with_suffix(".log")
        argv = [str(config), "--redis-url", url, *extra]
        child = {"ARGUMENTS": (argv, environment, str(log_path))}
        process = _FORKS.Process(
            target=runpy.run_path, args=(str(_CHILD), child, "__main__"), daemon=True
        )
        process.start()
        return cls(process, log_path)

    async def wait(self, timeout_s: float = 60.0) -> int:
        """The exit code (negative: killed by that signal); fails with the log after a while."""
        await asyncio.to_thread(self.process.join, timeout_s)
        if self.process.exitcode is None:
            self.stop()
            raise AssertionError(f"learner did not end:\n{self.log()}")
        return self.process.exitcode

    def log(self) -> str:
        """What it wrote so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")[-6000:]

    def stop(self) -> None:
        """Kill it if it runs."""
        self.process.kill()
        self.process.join()


async def until(
    condition: Callable[[], Awaitable[bool]], what: str, timeout_s: float = 30.0
) -> None:
    """Poll until ``condition`` holds."""
    deadline = time.monotonic() + timeout_s
    while not await condition():
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        await asyncio.sleep(0.02)


def config_path(feeder: Feeder) -> Path:
    """The file that ``write_config`` made for this run."""
    return feeder.config.run.dir.parent / f"{feeder.config.run.name}.toml"


async def check_ledger(feeder: Feeder, trained_tokens: int) -> None:
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
    assert ledger["trained"] == sum(trained.values()) == trained_tokens
    assert ledger["masked"] == masked
