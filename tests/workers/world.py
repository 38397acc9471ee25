"""One run for worker tests: feeds, publishes, starts workers in this process, reads records."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors.numpy import load_file

from ringasync.broker.client import Broker
from ringasync.broker.types import Fence, NewGroup, VersionInfo
from ringasync.config.load import config_hash
from ringasync.config.schema import Config
from ringasync.records.segment import decode_segment
from ringasync.records.trajectory import FlatResponse, join_segments
from ringasync.records.weights import PeerOffer, ProbeSequence
from ringasync.runtime.shutdown import Shutdown
from ringasync.weights.file_transport import FileTransport
from ringasync.weights.manifest import VersionFields, dump_manifest
from workers.engines.base import Engine, SamplingParams
from workers.engines.scripted import (
    VOCAB_SIZE,
    ScriptedEngine,
    scripted_logprobs,
    write_scripted_weights,
)
from workers.intake import ModelLimits
from workers.rollout_loop import RolloutWorker

TTL_MS = 5000
DEADLINE_S = 20.0
EOS = VOCAB_SIZE + 1
"""Never sampled: rollouts end by length."""
WINDOW_TOKENS = 200
PROMPT = (1, 2, 3)

MakeTestEngine = Callable[[SamplingParams], Engine]


async def until(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Wait for a condition, plain or awaitable; fails the test at a deadline."""
    try:
        async with asyncio.timeout(deadline_s):
            while True:
                met = condition()
                if isinstance(met, Awaitable):
                    met = await met
                if met:
                    return
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"waited {deadline_s} s for: {what}") from None


@dataclass
class RunningWorker:
    """A worker in this process. ``engines`` are all it ever made, the newest last."""

    worker: RolloutWorker
    shutdown: Shutdown
    broker: Broker
    engines: list[Any] = field(default_factory=list)
    task: asyncio.Task[str] = field(init=False)

    @property
    def engine(self) -> Any:
        return self.engines[-1]

    async def stop(self) -> str:
        """Ask for a drain and wait for the end; returns why it ended."""
        self.shutdown.request("a test")
        async with asyncio.timeout(DEADLINE_S):
            return await self.task


class World:
    """See the module. Coordinator and learner are this object, by hand."""

    def __init__(self, url: str, broker: Broker, config: Config, fences: dict[str, Fence]) -> None:
        self.url, self.broker, self.config = url, broker, config
        self.coordinator, self.learner = fences["coordinator"], fences["learner"]
        self.transport = FileTransport(config.run_dir / "weights", 3)
        self.workers: list[RunningWorker] = []
        self._requests = 0

    @classmethod
    async def make(
        cls,
        url: str,
        run: str,
        folder: Path,
        *,
        mode: str = "pipelined",
        sections: Mapping[str, Any] = MappingProxyType({}),
        **worker: Any,
    ) -> World:
        """Create the run. ``worker`` overrides the fast settings of worker tests, ``sections``
        are further ones of the configuration."""
        settings = {
            "flush_tokens": 8,
            "flush_ms": 40,
            "heartbeat_ms": 20,
            "session_ttl_ms": TTL_MS,
            "max_concurrent": 16,
            "drain_timeout_s": 10.0,
        } | worker
        config = Config.model_validate(
            {
                "run": {"name": run, "dir": str(folder / "runs")},
                "data": {"tasks": [{"name": "sums", "kind": "mathematics"}]},
                "worker": settings,
                "schedule": {"mode": mode},
                "grader": {"in_worker": False},
                **sections,
            }
        )
        broker = await Broker.connect(url, run)
        await broker.create_run("", config_hash(config), mode)
        fences = {
            role: await broker.acquire_lock(role, "test", 600_000)
            for role in ("coordinator", "learner")
        }
        return cls(url, broker, config, fences)

    async def close(self) -> None:
        """Kill the workers that still run and delete the run."""
        for running in self.workers:
            running.task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await running.task
            await running.broker.close()
        await self.transport.close()
        await self.broker.delete_run()
        await self.broker.close()

    def request(self) -> str:
        """A fresh request id."""
        self._requests += 1
        return f"request-{self._requests}"

    async def feed(
        self,
        *group_ids: str,
        size: int = 2,
        max_new_tokens: int = 40,
        prompt_ids: Sequence[int] = PROMPT,
        kind: str = "train",
    ) -> None:
        """Feed groups of the same prompt."""
        groups = [
            NewGroup(
                group_id=group_id,
                kind="eval" if kind == "eval" else "train",
                domain="sums",
                prompt="1+1=",
                prompt_ids=tuple(prompt_ids),
                task={"answer": "2"},
                source_index=0,
                size=size,
                max_new_tokens=max_new_tokens,
            )
            for group_id in group_ids
        ]
        assert await self.broker.feed(self.coordinator, self.request(), groups, "c") == len(groups)

    async def publish(
        self,
        version: int,
        *,
        value: float | None = None,
        probe_error: float = 0.0,
        peer: PeerOffer | None = None,
    ) -> Path:
        """Publish scripted weights; ``probe_error`` falsifies the learner's probe log-probs."""
        source = write_scripted_weights(
            self.config.run_dir / f"source-{version}", float(version) if value is None else value
        )
        tokens = [5, 7, 11, 13, 2, 3]
        tensors = load_file(source / "model.safetensors")
        logprobs = [
            float(scripted_logprobs(tensors, [*PROMPT, *tokens[:i]], 1.0)[token]) - probe_error
            for i, token in enumerate(tokens)
        ]
        probe = ProbeSequence(prompt_ids=PROMPT, token_ids=tuple(tokens), logprobs=tuple(logprobs))
        await self.publish_folder(version, source, probe, peer=peer)
        return source

    async def publish_folder(
        self, version: int, source: Path, *probe: ProbeSequence, peer: PeerOffer | None = None
    ) -> None:
        """Publish any HF-format folder, with an offer of its tensors if one is given."""
        fields = VersionFields(
            run=self.config.run.name,
            policy_version=version,
            learner_step=version - 1,
            fork_step=0,
            fence=self.learner.token,
            probe=probe,
        )
        published = await self.transport.publish(source, fields)
        manifest = published.model_copy(update={"peer": peer})
        info = VersionInfo(version, version - 1, 0, dump_manifest(manifest))
        await self.broker.publish(self.learner, info)

    async def start(
        self, name: str, make_engine: MakeTestEngine | None = None, **options: Any
    ) -> RunningWorker:
        """Start a worker; by default its engine steps by itself, one token a millisecond."""
        settings = self.config.worker.model_copy(update=options)
        config = self.config.model_copy(update={"worker": settings})
        make = make_engine or (lambda sampling: ScriptedEngine(sampling, step_interval_s=0.001))
        engines: list[Any] = []

        def made(_folder: Path) -> Engine:
            engine = make(SamplingParams(1.0, (EOS,)))
            engines.append(engine)
            return engine

        broker = await Broker.connect(self.url, config.run.name, retry_budget_s=5.0)
        shutdown = Shutdown()
        worker = RolloutWorker(
            config,
            broker,
            FileTransport(config.run_dir / "weights", 3),
            made,
            lambda _folder: ModelLimits(WINDOW_TOKENS, (EOS,), VOCAB_SIZE),
            shutdown,
            worker_id=name,
            scratch_dir=config.run_dir / "scratch",
        )
        running = RunningWorker(worker, shutdown, broker, engines)
        running.task = asyncio.create_task(worker.run(), name=f"worker-{name}")
        self.workers.append(running)
        return running

    async def heartbeats(self, count: int) -> None:
        """Wait until some worker has sent this many more heartbeats: life went on that long."""
        seen: set[str] = set()

        async def sent() -> bool:
            seen.update(row.get("beat_ms", "") for row in await self.broker.sessions())
            return len(seen) > count

        await until(sent, f"{count} heartbeats")

    # What the broker holds.

    async def field(self, rollout_id: str, name: str) -> str:
        """One field of a rollout's hash."""
        return (await self.broker.rollout(rollout_id) or {}).get(name, "")

    async def state(self, rollout_id: str) -> str:
        """A rollout's state."""
        return await self.field(rollout_id, "state")

    async def states(self, *rollout_ids: str) -> set[str]:
        """The states of several rollouts."""
        return {await self.state(rollout_id) for rollout_id in rollout_ids}

    async def length(self, rollout_id: str) -> int:
        """Tokens that Redis holds of a rollout."""
        return int(await self.field(rollout_id, "length") or 0)

    async def record(self, rollout_id: str) -> FlatResponse:
        """A rollout's segments, decoded and joined (which checks that they fit together)."""
        raw = await self.broker.client.lrange(self.broker.keys.segments(rollout_id), 0, -1)
        return join_segments([decode_segment(p) for p in raw if isinstance(p, bytes)])

    async def wait_state(self, state: str, *rollout_ids: str) -> None:
        """Wait until all rollouts are in this state."""

        async def reached() -> bool:
            return await self.states(*rollout_ids) == {state}

        await until(reached, f"{rollout_ids} to be {state}")

    async def assert_balanced(self) -> None:
        """The ledger balances and the audit finds no broken link."""
        report = await self.broker.audit()
        assert report.balanced, report
        assert not report.problems, report.problems

    async def assert_true_logprobs(
        self, rollout_id: str, folders: dict[int, Path], prompt: Sequence[int] = PROMPT
    ) -> None:
        """Every recorded log-prob is that of the version recorded beside it."""
        response = await self.record(rollout_id)
        tokens = response.token_ids.tolist()
        tensors = {v: load_file(folder / "model.safetensors") for v, folder in folders.items()}
        for i, (token, version) in enumerate(
            zip(tokens, response.policy_versions.tolist(), strict=True)
        ):
            expected = scripted_logprobs(tensors[version], [*prompt, *tokens[:i]], 1.0)[token]
            assert abs(float(response.behavior_logprobs[i]) - float(expected)) < 1e-6
