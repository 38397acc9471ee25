"""A run for faults: its settings, its processes, its small disks, its clocks."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import tomli_w

from ringasync.runtime.role import read_embedded_url
from tests.e2e.tiny_run import REWARD_MODULE
from workers import token_trace

from .faults import SESSION_TTL_S
from .proxy import Proxy

RUN = "chaos"
WORKERS, GRADERS = 3, 2
FLUSH_TOKENS = 16
MAX_CONCURRENT = 12
DISK_BYTES = {"redis": 256 << 20, "learner": 96 << 20}
FILLER = "filler"


def settings(folder: Path, model: Path, seed: int, prompts: int) -> dict[str, Any]:
    """One pass over ``prompts`` prompts, so that at the end every group has ended.

    Even seeds are pipelined, odd ones run in rounds; of both, every second publishes in Redis.
    """
    data = folder / "prompts.jsonl"
    rows = [{"prompt": f"{chr(97 + i % 16)}{i}=?", "answer": ""} for i in range(prompts)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "chaos_reward.py").write_text(REWARD_MODULE, encoding="utf-8")
    ttl_ms = round(SESSION_TTL_S * 1000)
    return {
        "run": {"name": RUN, "dir": str(folder / "runs"), "seed": seed},
        "model": {"path": str(model), "max_model_len_tokens": 200},
        "data": {
            "epochs": 1,
            "tasks": [
                {
                    "name": "letters",
                    "kind": "jsonl",
                    "dataset": str(data),
                    "verifier": "python:chaos_reward:share_of_early_letters",
                }
            ],
        },
        "sampling": {"max_new_tokens": 160},
        "worker": {
            "engine": "scripted",
            "engine_options": {"step_interval_s": 0.04},
            "count": WORKERS,
            "max_concurrent": MAX_CONCURRENT,
            "flush_tokens": FLUSH_TOKENS,
            "flush_ms": 200,
            "heartbeat_ms": 300,
            "session_ttl_ms": ttl_ms,
        },
        "grader": {"in_worker": False, "isolation": "preferred", "max_attempts": 8},
        "schedule": {
            "mode": ("pipelined", "rounds")[seed % 2],
            "group_size": 4,
            "budget": {"tokens": 1024},
            "pool_capacity": 64,
        },
        "learner": {
            "steps": 1_000_000,
            "lr": 1e-4,
            "checkpoint_every_steps": 10,
            "lock_ttl_ms": ttl_ms,
        },
        "weights": {"canary": False, "transport": ("file", "redis")[seed // 2 % 2]},
        "eval": {"prompts": 0},
        "observability": {"tensorboard": False, "stall_report_s": 10.0},
    }


def faketime_library() -> Path | None:
    """The shared object of the ``libfaketime`` package, if it is there and runs on this machine."""
    spec = find_spec("libfaketime") if sys.platform == "linux" else None
    for folder in (spec.submodule_search_locations or []) if spec else []:
        library = Path(folder) / "vendor/libfaketime/src/libfaketime.so.1"
        if library.is_file():
            probe = subprocess.run(
                ["true"], env={"LD_PRELOAD": str(library)}, capture_output=True, check=False
            )
            return None if probe.stderr else library
    return None


class Stage:
    """One run of ``ringasync up`` in ``folder``, with everything that faults take hold of.

    ``skipped`` maps kinds of faults that this machine cannot do to the reason.
    """

    def __init__(self, folder: Path, model: Path, seed: int, prompts: int) -> None:
        self.folder, self.run_dir = folder, folder / "runs" / RUN
        self.trace = folder / "trace"
        self.log = folder / "up.log"
        self.skipped: dict[str, str] = {}
        self.disks: dict[str, Path] = {}
        self.trace.mkdir(parents=True)
        self.run_dir.mkdir(parents=True)
        self._config = folder / "run.toml"
        self._config.write_bytes(tomli_w.dumps(settings(folder, model, seed, prompts)).encode())
        # Every second pair of seeds has a standby for the roles that exist once.
        count = 1 + seed // 4 % 2
        self.roles = [
            *(f"coordinator-{n + 1}" for n in range(count)),
            *(f"learner-{n + 1}" for n in range(count)),
            *(f"worker-{n + 1}" for n in range(WORKERS)),
            *(f"grader-{n + 1}" for n in range(GRADERS)),
        ]
        self._mount_disks()
        self.proxy = Proxy(self.roles, self.redis_port)
        self._role_of = {port: name for name, port in self.proxy.ports.items()}
        self._clock_environment = self._clocks()
        (folder / "plan.json").write_text(
            json.dumps(
                {
                    "ports": self.proxy.ports,
                    "clocks": {name: self._clock_environment.get(name, {"LD_PRELOAD": ""})
                               for name in self.roles},
                }
            )
        )  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """``ringasync up``; the same command goes on with a run that was stopped."""
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(self.folder), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            token_trace.ENV: str(self.trace),
            **self._clock_environment.get("redis", {}),
        }
        driver = Path(__file__).with_name("up_driver.py")
        with self.log.open("ab") as sink:
            self.process = subprocess.Popen(
                [sys.executable, driver, self._config, self.folder / "plan.json"],
                stdout=sink,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )

    def exit_code(self) -> int | None:
        """How ``up`` ended; None while it goes on."""
        return self.process.poll() if self.process else None

    def pids(self) -> dict[str, int]:
        """Process ids of the roles' main processes that live now."""
        found: dict[str, int] = {}
        if self.process is None:
            return found
        try:
            children = psutil.Process(self.process.pid).children()
        except psutil.NoSuchProcess:
            return found
        for child in children:
            with contextlib.suppress(psutil.Error, ValueError, KeyError):
                command = child.cmdline()
                url = command[command.index("--redis-url") + 1]
                found[self._role_of[urlsplit(url).port or 0]] = child.pid
        return found

    def redis_port(self) -> int:
        """Where the embedded Redis listens. Raises ``OSError`` while it never did."""
        try:
            return urlsplit(read_embedded_url(self.run_dir)).port or 0
        except Exception as error:
            raise OSError(str(error)) from error

    def fill(self, disk: str) -> bool:
        """Leave no byte free; whether the disk is full now."""
        with (self.disks[disk] / FILLER).open("ab") as filler:
            try:
                for size in (1 << 20, 1 << 12, 1):
                    with contextlib.suppress(OSError):
                        while True:
                            os.write(filler.fileno(), b"\0" * size)
            except OSError:
                pass
        return shutil.disk_usage(self.disks[disk]).free == 0

    def free(self, disk: str) -> None:
        """Give the space back."""
        (self.disks[disk] / FILLER).unlink(missing_ok=True)

    def set_clock(self, name: str, offset_s: float) -> None:
        """Let the clock of ``redis`` or a coordinator jump; it is noticed within a second."""
        path = self.folder / f"clock-{name}"
        staging = path.with_suffix(".new")
        staging.write_text(f"{offset_s:+.3f}\n")
        staging.replace(path)

    def close(self, *, keep_disks: bool = False) -> None:
        """Kill what is left, undo the mounts; with ``keep_disks`` their files stay, for a look."""
        if self.process is not None:
            _kill_tree(self.process.pid)
            self.process.wait()
        for pid in self._stray_redis():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.proxy.close()
        for disk, path in self.disks.items():
            self.free(disk)
            if keep_disks:
                shutil.copytree(path, path.with_name(path.name + "-kept"), dirs_exist_ok=True)
            subprocess.run(["umount", "--lazy", str(path)], check=False)
        self.disks.clear()

    def tail(self, lines: int = 25) -> str:
        """Last lines of the supervisor's and every role's log."""
        parts = []
        for file in [self.log, *sorted(self.run_dir.glob("logs/*-?.log"))]:
            last = file.read_text(errors="replace").splitlines()[-lines:]
            parts.append(f"--- {file.name}\n" + "\n".join(last))
        return "\n".join(parts)

    def _stray_redis(self) -> Iterator[int]:
        """The embedded Redis outlives a killed supervisor."""
        place = (self.run_dir / "redis").resolve()
        for process in psutil.process_iter(["name", "cwd"]):
            name, cwd = process.info["name"] or "", process.info["cwd"]
            if "redis" in name and cwd and Path(cwd) == place:
                yield process.pid

    def _mount_disks(self) -> None:
        """A small disk for Redis's log, another for journal and checkpoints."""
        contents = {"redis": ("redis",), "learner": ("journal", "checkpoints")}
        for disk, folders in contents.items():
            path = self.folder / "disks" / disk
            path.mkdir(parents=True)
            options = ["-t", "tmpfs", "-o", f"size={DISK_BYTES[disk]}", "chaos"]
            done = subprocess.run(
                ["mount", *options, str(path)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                self.skipped["disk"] = f"no tmpfs can be mounted: {done.stderr.strip()}"
                return
            self.disks[disk] = path
            for name in folders:
                (path / name).mkdir()
                (self.run_dir / name).symlink_to(path / name)

    def _clocks(self) -> dict[str, dict[str, str]]:
        """Environment of everything whose clock may jump. Monotonic clocks stay true."""
        library = faketime_library()
        if library is None:
            self.skipped["clock"] = "the package libfaketime is not there or does not load"
            return {}
        names = ["redis", *(name for name in self.roles if name.startswith("coordinator"))]
        for name in names:
            self.set_clock(name, 0.0)
        return {
            name: {
                "LD_PRELOAD": str(library),
                "FAKETIME_TIMESTAMP_FILE": str(self.folder / f"clock-{name}"),
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
                "FAKETIME_CACHE_DURATION": "1",
            }
            for name in names
        }


def _kill_tree(pid: int) -> None:
    try:
        top = psutil.Process(pid)
        family = [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
