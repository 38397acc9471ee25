"""A whole run, small enough for a test: random tiny model, JSONL prompts, a user's own reward."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import tomli_w

from ringasync.broker.client import Broker

ALPHABET = "abcdefghijklmnop0123456789 =?"
REWARD_MODULE = '''
def share_of_early_letters(task, response):
    """Reward in [0, 1] that a random model meets halfway: letters a..h among all letters."""
    letters = [c for c in response if c.isalpha()]
    return sum(c <= "h" for c in letters) / len(letters) if letters else 0.0
'''


def build_tiny_model(folder: Path, *, seed: int = 0) -> Path:
    """A random two-layer Qwen3 with a character tokenizer, saved in HF format."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *ALPHABET])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_settings(folder: Path, model: Path, **overrides: Any) -> dict[str, Any]:
    """Settings of a run of a few seconds; ``overrides`` are dotted keys with ``__`` for the dot."""
    rows = [{"prompt": f"{chr(97 + i % 16)}{i % 10}=?", "answer": ""} for i in range(160)]
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "e2e_reward.py").write_text(REWARD_MODULE, encoding="utf-8")
    settings: dict[str, Any] = {
        "run": {"name": "tiny", "dir": str(folder / "runs"), "seed": 1},
        "model": {"path": str(model), "max_model_len_tokens": 96},
        "data": {
            "tasks": [
                {
                    "name": "letters",
                    "kind": "jsonl",
                    "dataset": str(data),
                    "verifier": "python:e2e_reward:share_of_early_letters",
                }
            ]
        },
        "sampling": {"max_new_tokens": 64},
        "worker": {
            "count": 2,
            "max_concurrent": 16,
            "flush_tokens": 8,
            "flush_ms": 50,
            "heartbeat_ms": 200,
            "session_ttl_ms": 2000,
        },
        "schedule": {"group_size": 4, "budget": {"tokens": 1024}, "pool_capacity": 48},
        "learner": {"steps": 8, "lr": 1e-3, "checkpoint_every_steps": 3, "warmup_steps": 1},
        "grader": {"isolation": "preferred"},
        "eval": {"prompts": 32},
        "observability": {"tensorboard": False, "stall_report_s": 10.0},
    }
    for dotted, value in overrides.items():
        section = settings
        *parents, leaf = dotted.split("__")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = value
    return settings


@dataclass
class TinyRun:
    """A run started by ``ringasync up``; the paths and processes a test looks at."""

    config: Path
    run_dir: Path
    process: subprocess.Popen[bytes]
    log: Path
    env: dict[str, str]

    def summary(self) -> dict[str, Any]:
        """``summary.json`` of the finished run."""
        loaded: dict[str, Any] = json.loads((self.run_dir / "summary.json").read_text())
        return loaded

    def role_pids(self, role: str) -> list[int]:
        """Process ids of a role's main processes, oldest first."""
        module = {"coordinator": "ringasync.coordinator", "worker": "workers"}.get(role, role)
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                command = child.cmdline()
            except psutil.Error:
                continue
            if "-m" in command and command[command.index("-m") + 1] == module:
                found.append((child.create_time(), child.pid))
        return [pid for _, pid in sorted(found)]

    def redis_processes(self) -> list[psutil.Process]:
        """The embedded Redis, found by its folder: it has a session of its own."""
        folder = str(self.run_dir / "redis")
        return [
            process
            for process in psutil.process_iter(["name", "cwd"])
            if "redis" in (process.info["name"] or "") and process.info["cwd"] == folder
        ]

    @asynccontextmanager
    async def broker(self) -> AsyncIterator[Broker]:
        """A client of the run's embedded Redis."""
        url = (self.run_dir / "redis" / "redis.url").read_text().strip()
        broker = await Broker.connect(url, self.run_dir.name)
        try:
            yield broker
        finally:
            await broker.close()

    def wait(self, timeout_s: float) -> int:
        """Exit code of ``ringasync up``; the log's tail is shown when it does not end in time."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"run did not end in {timeout_s} s:\n{self.tail()}") from None

    def tail(self) -> str:
        """Last lines of the supervisor's and every role's log."""
        parts = []
        for file in [self.log, *sorted(self.run_dir.glob("logs/*.log"))]:
            lines = file.read_text(errors="replace").splitlines()[-25:]
            parts.append(f"--- {file.name}\n" + "\n".join(lines))
        return "\n".join(parts)

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
        """Poll ``condition``; fail with the logs when it does not come true or the run ends."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            ended = self.process.poll()
            if ended is not None or time.monotonic() > deadline:
                raise AssertionError(f"{what} did not happen (exit {ended}):\n{self.tail()}")
            time.sleep(0.05)


def ringasync(*arguments: str | Path, env: dict[str, str] | None = None) -> list[str]:
    """Command line of the CLI in this interpreter."""
    return [sys.executable, "-m", "ringasync", *map(str, arguments)]


def write_config(folder: Path, settings: dict[str, Any]) -> Path:
    """Write settings as TOML and return the path."""
    path = folder / "run.toml"
    path.write_bytes(tomli_w.dumps(settings).encode())
    return path


@contextmanager
def started(folder: Path, settings: dict[str, Any], **env: str) -> Iterator[TinyRun]:
    """Start ``ringasync up`` on these settings; kill whatever is left at the end."""
    config = write_config(folder, settings)
    log = folder / "up.log"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **env,
    }
    with log.open("ab") as sink:
        process = subprocess.Popen(
            ringasync("up", config),
            stdout=sink,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
    run_dir = Path(settings["run"]["dir"]) / settings["run"]["name"]
    run = TinyRun(config, run_dir, process, log, environment)
    try:
        yield run
    finally:
        _kill_tree(process.pid)
        process.wait()
        # It may outlive a killed supervisor.
        for redis in run.redis_processes():
            redis.kill()


def _kill_tree(pid: int) -> None:
    try:
        family = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    for process in [*family]:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
