"""A run of ``ringasync up`` beside which a benchmark starts scripted workers of its own.

The model is tiny, its tokenizer the demo's; workers generate at a fixed pace whatever it is, and
answers end at their limit only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import tomli_w

from learner.starter_model import build_model
from learner.starter_tokenizer import ALPHABET, SPECIAL, build_tokenizer
from ringasync.broker.client import Broker
from ringasync.config.schema import StarterConfig
from ringasync.errors import RingError
from ringasync.runtime.role import read_embedded_url
from workers.engines.scripted import VOCAB_SIZE

RUN = "scripted"
PROMPT_ROOM_TOKENS = 64
NEVER_FLUSHED_TOKENS = 1_000_000
"""``worker.flush_tokens`` of workers that send no partials: the engine is held at twice as many."""
_START_TIMEOUT_S = 180.0
_REWARD = '''
def share_of_odd(task, response):
    """Reward in [0, 1] that answers seldom share: characters of odd code among all."""
    return sum(ord(one) % 2 for one in response) / max(1, len(response))
'''


def write_run(
    folder: Path,
    response_tokens: int,
    sections: Mapping[str, dict[str, Any]],
    *,
    prompts: int = 5000,
) -> Path:
    """The model, the prompts and the run's TOML file, which is returned.

    ``sections`` go over what is the same for all: no worker of the supervisor's own, no canary, no
    evaluation, no TensorBoard.
    """
    model, limit = folder / "model", response_tokens + PROMPT_ROOM_TOKENS
    tokenizer = build_tokenizer()
    starter = StarterConfig(
        hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, intermediate_size=96
    )
    built = build_model(starter, len(SPECIAL) + len(ALPHABET), limit)
    # The engine samples ids below VOCAB_SIZE: with this one no answer ends before its limit.
    built.config.eos_token_id = built.generation_config.eos_token_id = VOCAB_SIZE + 1
    built.save_pretrained(model)
    tokenizer.save_pretrained(model)
    rows = [{"prompt": f"{number}=?", "answer": ""} for number in range(prompts)]
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "benchmark_reward.py").write_text(_REWARD, encoding="utf-8")
    task = {
        "name": "odd",
        "kind": "jsonl",
        "dataset": str(data),
        "verifier": "python:benchmark_reward:share_of_odd",
    }
    config: dict[str, dict[str, Any]] = {
        "run": {"name": RUN, "dir": str(folder / "runs")},
        "model": {"path": str(model), "max_model_len_tokens": limit},
        "data": {"tasks": [task]},
        "sampling": {"max_new_tokens": response_tokens},
        "worker": {"engine": "scripted", "count": 0},
        "grader": {"isolation": "off"},
        "learner": {"steps": 1_000_000, "lr": 1e-5, "checkpoint_every_steps": 1000},
        "weights": {"canary": False},
        "eval": {"prompts": 0},
        "observability": {"tensorboard": False},
    }
    for name, section in sections.items():
        config.setdefault(name, {}).update(section)
    path = folder / "run.toml"
    path.write_text(tomli_w.dumps(config), encoding="utf-8")
    return path


@contextlib.asynccontextmanager
async def up(config: Path) -> AsyncIterator[tuple[Broker, str]]:
    """The run, from its first published version on: a client of its Redis, and Redis's URL.

    Ended by SIGTERM. Raises ``RuntimeError`` when it does not come up; ``up.log`` says why.
    """
    run_dir = config.parent / "runs" / RUN
    process = _start(config)
    try:
        broker = await _joined(run_dir, process)
        try:
            yield broker, read_embedded_url(run_dir)
        finally:
            await broker.close()
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def start_worker(
    config: Path, url: str, name: str, *, sends_partials: bool = True, **env: str
) -> subprocess.Popen[bytes]:
    """A worker in a process group of its own, so that SIGKILL can take all of it."""
    module = "workers" if sends_partials else "benchmarks.whole_rollout_worker"
    return subprocess.Popen(
        [sys.executable, "-m", module, str(config), "--redis-url", url, "--worker-id", name],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=config.parent,
        start_new_session=True,
        env={**environment(), **env},
    )


def kill_worker(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to its whole group; one that has ended is taken note of."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def environment() -> dict[str, str]:
    """This process's, with the checkout on Python's path and one thread for torch."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def _start(config: Path) -> subprocess.Popen[bytes]:
    with (config.parent / "up.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "ringasync", "up", str(config)],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=config.parent,
            env=environment(),
        )


async def _joined(run_dir: Path, process: subprocess.Popen[bytes]) -> Broker:
    until_s = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < until_s:
        if process.poll() is not None:
            raise RuntimeError(f"`ringasync up` ended with {process.returncode}: see up.log")
        with contextlib.suppress(RingError):
            broker = await Broker.connect(read_embedded_url(run_dir), RUN, retry_budget_s=5)
            if await broker.version() is not None:
                return broker
            await broker.close()
        await asyncio.sleep(0.5)
    raise RuntimeError(f"no version was published in {_START_TIMEOUT_S:g} s: see up.log")
