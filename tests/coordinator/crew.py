"""Everybody but the coordinator, in one object: a worker, a grader and a learner made of tokens.

They use the broker exactly as the real roles do, so that only the engine and the optimizer are
missing.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringasync.broker.client import Broker
from ringasync.broker.types import AppendItem, Fence, TrainedTokens, Verdict, VersionInfo
from ringasync.config.load import config_hash, resolved_json
from ringasync.config.schema import Config
from ringasync.coordinator.prompts import PromptSource
from ringasync.errors import BadPromptError
from ringasync.records.segment import encode_segment, policy_segment

TTL_MS = 3000


def make_config(folder: Path, run: str, **overrides: Any) -> Config:
    """Settings of a short run; ``overrides`` are dotted keys with ``__`` for the dot."""
    settings: dict[str, Any] = {
        "run": {"name": run, "dir": str(folder / "runs")},
        "model": {"path": "none", "max_model_len_tokens": 48},
        "data": {"tasks": [{"name": "words", "kind": "jsonl", "dataset": "unused"}]},
        "sampling": {"max_new_tokens": 16},
        "worker": {"heartbeat_ms": 100, "session_ttl_ms": 1000},
        "schedule": {
            "group_size": 2,
            "budget": {"tokens": 64},
            "pool_capacity": 12,
            "filter_zero_variance": False,
        },
        "learner": {"steps": 4},
        "eval": {"prompts": 8, "timeout_s": 30},
        "observability": {"tensorboard": False, "stall_report_s": 1.0},
    }
    for dotted, value in overrides.items():
        section, _, leaf = dotted.rpartition("__")
        target = settings.setdefault(section, {}) if section else settings
        if section == "schedule" and leaf == "budget_tokens":
            target["budget"] = {**target["budget"], "tokens": value}
        else:
            target[leaf] = value
    return Config.model_validate(settings)


@dataclass(frozen=True)
class Word:
    """One scripted prompt."""

    prompt: str
    domain: str
    task: dict[str, Any]


class Words:
    """A mixture of ``size`` prompts (None: without end); ``bad`` indices are bad rows."""

    def __init__(
        self, prefix: str, size: int | None = None, bad: frozenset[int] = frozenset()
    ) -> None:
        self._prefix, self._size, self._bad = prefix, size, bad

    def problem(self, index: int) -> Word:
        """Prompt ``index``."""
        if self._size is not None and index >= self._size:
            raise IndexError(index)
        if index in self._bad:
            raise BadPromptError(f"row {index} is broken")
        return Word(f"{self._prefix} {index}", "even" if index % 2 == 0 else "odd", {"i": index})


def letters(prompt: str) -> list[int]:
    """One token a character."""
    return [ord(character) for character in prompt]


def words_source(config: Config, _model: str = "", *, size: int | None = None) -> PromptSource:
    """Prompts "train 0", "train 1", ...; held out are "held 0", "held 1", ..."""
    return PromptSource(config, Words("train", size), Words("held"), letters)


class Crew:
    """Worker, grader and learner by hand. ``length`` and ``reward`` are functions of rollout id."""

    def __init__(
        self,
        broker: Broker,
        config: Config,
        *,
        length: Callable[[str], int] = lambda _rollout_id: 8,
        reward: Callable[[str], float] | None = None,
    ) -> None:
        self.broker, self.config, self.length = broker, config, length
        self.reward = reward or _coin
        self.loaded = 0
        self.session = "crew.1"
        self.steps_trained = 0
        self._fence: Fence | None = None

    @property
    def fence(self) -> Fence:
        """The learner's lock."""
        assert self._fence is not None
        return self._fence

    async def join(self) -> None:
        """Wait for the run, open the session, take the learner's lock, publish version 1."""
        await until(lambda: self._exists(), "the run to be created")
        await self.open()
        self._fence = await self.broker.acquire_lock("learner", "crew", 60_000)
        await self.publish(0)

    async def open(self) -> None:
        """Open the worker's session."""
        await self.broker.open_session(self.session, "worker", TTL_MS, {"worker": "crew"})

    async def _exists(self) -> bool:
        return bool(await self.broker.client.exists(self.broker.keys.meta))

    async def publish(self, learner_step: int) -> None:
        """Announce the next version; the worker loads it unless another one is pinned."""
        await self.broker.publish(self.fence, VersionInfo(learner_step + 1, learner_step, 0, "{}"))

    async def beat(self) -> None:
        """Heartbeat; load the newest version, or the pinned one."""
        status: dict[str, str | int | float] = {
            "doing": "generating",
            "policy_version": self.loaded,
        }
        poll = await self.broker.heartbeat(self.session, TTL_MS, status)
        if not poll.alive:
            await self.open()
        self.loaded = poll.pin_version or poll.latest_version

    async def generate(self, n: int = 16) -> int:
        """Take up to ``n`` rollouts, write their tokens, finish them; how many."""
        leases = await self.broker.take(self.session, n, self.loaded)
        items, ends = [], []
        for lease in leases:
            total = self.length(lease.rollout_id)
            new = total - lease.num_tokens
            payload = encode_segment(
                policy_segment(lease.num_tokens, self.loaded, [1] * new, [-0.5] * new)
            )
            items.append(
                AppendItem(
                    lease.rollout_id, lease.token, lease.num_tokens, new, new, self.loaded, payload
                )
            )
            ends.append((lease.rollout_id, lease.token, "stop", total))
        await self.broker.append_many(self.session, items)
        await self.broker.finish_many(self.session, ends)
        return len(leases)

    async def grade(self) -> int:
        """Give a verdict on everything that is finished; how many."""
        jobs = await self.broker.take_grading(self.session, 64)
        verdicts = [Verdict(job.rollout_id, job.token, self.reward(job.rollout_id)) for job in jobs]
        schedule = self.config.schedule
        await self.broker.grade_many(self.session, verdicts, 3, schedule.filter_zero_variance, 0)
        return len(jobs)

    async def train(self, *, partial: bool = False) -> bool:
        """One learner step on whole ready groups of at least the budget; False if not enough."""
        groups = await self.broker.ready_groups(1000)
        chosen, tokens = [], 0
        for group in groups:
            if tokens < self.config.schedule.budget.tokens:
                chosen.append(group)
                tokens += group.num_tokens
        if not chosen or (tokens < self.config.schedule.budget.tokens and not partial):
            return False
        step, batch = self.steps_trained, f"b{self.steps_trained}"
        ids = [group.group_id for group in chosen]
        raw, _stale = await self.broker.reserve(self.fence, batch, ids, step, 1000)
        await self.broker.commit(self.fence, batch, {g.group_id: len(g.rollouts) for g in raw})
        sizes = {group.group_id: group.num_tokens for group in chosen}
        items = [TrainedTokens(g.group_id, sizes[g.group_id], 0, 0) for g in raw]
        await self.broker.mark_trained(self.fence, batch, items, step + 1)
        self.steps_trained += 1
        await self.publish(step + 1)
        await self.broker.push_metrics(
            "learner",
            {"step": step + 1, "policy_version": step + 2, "mask_rate": 0.25, "train_reward": 0.5},
        )
        return True

    async def turn(self) -> None:
        """A little of everything, as often as it is called."""
        await self.beat()
        await self.generate()
        await self.grade()
        poll = await self.broker.heartbeat(self.session, TTL_MS, {})
        rounds = self.config.schedule.mode == "rounds"
        if self.steps_trained >= self.config.learner.steps:
            return
        if rounds and poll.round_state == "training":
            await self.train(partial=True)
            await self.broker.finish_round(self.fence, poll.round_id)
        elif not rounds or poll.phase == "finishing":
            await self.train(partial=poll.phase == "finishing")

    async def work(self) -> None:
        """Work until the run is done."""
        while (await self.broker.run_meta())["phase"] != "done":
            await self.turn()
            await asyncio.sleep(0.01)


def _coin(rollout_id: str) -> float:
    return float(hashlib.sha256(rollout_id.encode()).digest()[0] % 2)


async def until(
    condition: Callable[[], Awaitable[bool] | bool], what: str, timeout_s: float = 20.0
) -> None:
    """Poll ``condition`` until it holds; fail after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while True:
        answer = condition()
        if answer if isinstance(answer, bool) else await answer:
            return
        assert time.monotonic() < deadline, f"{what}: did not happen within {timeout_s} s"
        await asyncio.sleep(0.02)


class Child:
    """A coordinator as a process of its own."""

    def __init__(self, config: Config, url: str, *, crash_at: str = "", size: int = 0) -> None:
        folder = config.run_dir.parent.parent
        settings = folder / f"settings-{config.run.name}.json"
        settings.write_text(resolved_json(config), encoding="utf-8")
        self.log = folder / f"coordinator-{time.monotonic_ns()}.log"
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        environment.pop("RINGASYNC_CRASH_AT", None)
        if crash_at:
            environment["RINGASYNC_CRASH_AT"] = crash_at
        with self.log.open("wb") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.coordinator.child", str(settings), url, str(size)],
                stdout=sink,
                stderr=sink,
                env=environment,
                cwd=Path(__file__).parents[2],
            )

    def kill(self) -> None:
        """SIGKILL, and wait."""
        self.process.kill()
        self.process.wait()

    def terminate(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)

    async def ended(self, timeout_s: float = 30.0) -> int:
        """Wait for its end; the exit code (negative: the signal)."""
        await until(lambda: self.process.poll() is not None, f"end of {self.log}", timeout_s)
        return int(self.process.returncode)

    def text(self) -> str:
        """What it logged."""
        return self.log.read_text(encoding="utf-8", errors="replace")


def metrics(config: Config) -> list[dict[str, Any]]:
    """All lines of the run's ``metrics.jsonl``."""
    path = config.run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def assert_each_entry_once(lines: list[dict[str, Any]]) -> None:
    """No stream entry twice in the file."""
    ids = [(line["stream"], line["id"]) for line in lines if "stream" in line]
    assert [one for one in set(ids) if ids.count(one) > 1] == []


async def fed_indices(broker: Broker) -> dict[str, int]:
    """Source index of every training group that Redis still knows, by group id."""
    found = {}
    async for key in broker.client.scan_iter(match=broker.keys.prefix + "group:g*", count=1000):
        group_id = key.decode().rpartition(":")[2]
        index = await broker.client.hget(key, "source_index")
        found[group_id] = int(index or -1)
    return found


__all__ = ["config_hash"]
