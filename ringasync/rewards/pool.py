"""A pool of verifier processes: each verdict is a finite number or an error, in bounded time.

A verifier may hang, fork, leak, write files, print or die. It does so in ``child``, a process
under limits, which is killed with everything it started and replaced. An error is never a zero
reward: the caller retries it.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import msgpack
import psutil

from ringasync.errors import InvariantError, VerifierCrashError, VerifierError, VerifierTimeoutError
from ringasync.rewards.child import MAX_FRAME_BYTES, pack_frame
from ringasync.rewards.isolation import (
    SCRATCH_BYTES,
    Sandbox,
    find_sandbox,
    sandbox_environment,
    seccomp_pipe,
)

Isolation = Literal["required", "preferred", "off"]
"""See ``grader.isolation`` and docs/sandbox.md."""

START_TIMEOUT_S = 60.0
"""Longest start of a process, and longest import of a verifier's modules."""

_CPU_GRACE_S = 2.0
_EXIT_GRACE_S = 1.0


@dataclass(slots=True)
class PoolStats:
    """What the pool did so far; times in seconds."""

    verdicts: int = 0
    errors: int = 0
    starts: int = 0
    kills: int = 0
    start_s: float = 0.0
    """Sum over ``starts``: from spawning to the first frame."""
    verify_s: float = 0.0
    """Sum over ``verdicts``: from sending the job to its verdict."""
    verify_max_s: float = 0.0


class VerifierPool:
    """``processes`` persistent children, started when first needed and replaced when they fail.

    As many again, in a sandbox, for the verifiers that run foreign code: the two kinds never share
    a process.
    """

    def __init__(
        self,
        processes: int,
        timeout_s: float,
        memory_bytes: int,
        *,
        start_timeout_s: float = START_TIMEOUT_S,
        isolation: Isolation = "off",
        readable: Sequence[str] = (),
    ) -> None:
        """Tries the sandbox, once a process, unless ``isolation`` is off: some 100 ms."""
        self._timeout_s = timeout_s
        self._memory_bytes = memory_bytes
        self._start_timeout_s = start_timeout_s
        self._isolation = isolation
        found = "it is off" if isolation == "off" else find_sandbox(readable)
        self._sandbox = found if isinstance(found, Sandbox) else None
        self.not_isolated = "" if isinstance(found, Sandbox) else found
        """Why nothing is isolated; empty where it is."""
        self._slots: dict[bool, asyncio.LifoQueue[_Child | None]] = {}
        for isolated in (False, True):
            self._slots[isolated] = asyncio.LifoQueue()
            for _ in range(processes):
                self._slots[isolated].put_nowait(None)
        self._alive: set[_Child] = set()
        self._closed = False
        self.stats = PoolStats()

    def refusal(self, verifier: str) -> str | None:
        """Why ``verifier`` will not be run here, or None: it has the isolation it must have."""
        if self._sandbox or self._isolation != "required" or not verifier.startswith("python:"):
            return None
        return (
            f"verifier {verifier!r} is foreign code and grader.isolation is 'required', but this "
            f"host cannot isolate it: {self.not_isolated}. Make bubblewrap work (docs/sandbox.md), "
            "or set grader.isolation to 'preferred' or 'off' if you trust that code"
        )

    async def verify(self, task: Mapping[str, Any], response: str) -> float:
        """Score one response; waits for a free process.

        Raises ``VerifierTimeoutError`` at the time limit and ``VerifierCrashError`` when the
        verifier raised, died, exceeded a limit, answered no finite number, or must be isolated
        and cannot be.
        """
        name = str(task.get("verifier", ""))
        if (refusal := self.refusal(name)) is not None:
            self.stats.errors += 1
            raise VerifierCrashError(refusal)
        sandbox = self._sandbox if runs_foreign_code(name) else None
        slots = self._slots[sandbox is not None]
        child = await slots.get()
        try:
            if child is None or not child.running:
                child = await self._replace(child, sandbox)
            began = time.monotonic()
            try:
                reward = await child.ask(task, response, self._timeout_s, self._start_timeout_s)
            except VerifierCrashError:
                if child.began:
                    raise
                # it died before the verifier ran, most likely while idle: not this job's fault
                child = await self._replace(child, sandbox)
                reward = await child.ask(task, response, self._timeout_s, self._start_timeout_s)
        except VerifierError:
            self.stats.errors += 1
            if child is not None and not child.usable:
                await self._kill(child)
            raise
        except BaseException:  # cancelled in the middle of a job: its answer must not be the next's
            if child is not None:
                await asyncio.shield(self._kill(child))
            raise
        finally:
            slots.put_nowait(child)
        elapsed_s = time.monotonic() - began
        self.stats.verdicts += 1
        self.stats.verify_s += elapsed_s
        self.stats.verify_max_s = max(self.stats.verify_max_s, elapsed_s)
        return reward

    async def close(self) -> None:
        """Kill every process. Verdicts still awaited fail with ``VerifierCrashError``."""
        self._closed = True
        await asyncio.gather(*(self._kill(child) for child in list(self._alive)))

    async def _replace(self, child: _Child | None, sandbox: Sandbox | None) -> _Child:
        if child in self._alive:  # died while it was idle
            await self._kill(child)
        if self._closed:
            raise VerifierCrashError("the pool of verifiers is closed")
        began = time.monotonic()
        fresh = await _Child.start(self._memory_bytes, sandbox)
        self._alive.add(fresh)
        try:
            if self._closed:  # while it started, so that ``close`` did not see it
                raise VerifierCrashError("the pool of verifiers is closed")
            await fresh.greet(self._start_timeout_s)
        except BaseException:
            await asyncio.shield(self._kill(fresh))
            raise
        self.stats.starts += 1
        self.stats.start_s += time.monotonic() - began
        return fresh

    async def _kill(self, child: _Child) -> None:
        self._alive.discard(child)
        self.stats.kills += 1
        await child.kill()


_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_LIBRARY_SETTINGS = dict.fromkeys(_THREADS, "1") | {"PYTHONDONTWRITEBYTECODE": "1"}


class _Child:
    """One verifier process and its two pipes; used by one job at a time."""

    def __init__(self, process: Process) -> None:
        if process.stdin is None or process.stdout is None:
            raise InvariantError("a verifier process was started without pipes")
        self._process, self._stdin, self._stdout = process, process.stdin, process.stdout
        self._last_id = 0
        self._reading = asyncio.Lock()
        """A job reads or ``kill`` does: of two readers, asyncio forgets to wake one."""
        self.usable = True
        self.began = False
        """Whether the process answered to its present job at all."""

    @classmethod
    async def start(cls, memory_bytes: int, sandbox: Sandbox | None) -> _Child:
        limits = {"memory_bytes": memory_bytes, "parent_pid": os.getpid(), "file_bytes": 0}
        environment = _child_environment()
        if sandbox is not None:  # bubblewrap is its parent, and sees to its end
            limits |= {"parent_pid": 0, "file_bytes": SCRATCH_BYTES}
            environment = sandbox_environment(environment) | _LIBRARY_SETTINGS
        command = [sys.executable, "-m", "ringasync.rewards.child", json.dumps(limits)]
        descriptors = [] if sandbox is None else [seccomp_pipe()]
        try:
            process = await asyncio.create_subprocess_exec(
                *(command if sandbox is None else sandbox.command(command, descriptors[0])),
                stdin=PIPE,
                stdout=PIPE,
                stderr=None if sandbox is None else DEVNULL,  # pid 1 of the sandbox keeps it open
                env=environment,
                pass_fds=descriptors,
                start_new_session=True,
            )
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return cls(process)

    @property
    def running(self) -> bool:
        return self.usable and self._process.returncode is None

    async def greet(self, timeout_s: float) -> None:
        """Wait for the first frame."""
        frame = await self._receive(timeout_s, "did not start")
        if frame.get("hello") != 1:
            raise self._broken(f"verifier process greeted with {frame!r}")

    async def ask(
        self, task: Mapping[str, Any], response: str, timeout_s: float, import_timeout_s: float
    ) -> float:
        """Send one job, wait for its imports and then, at most ``timeout_s``, for its verdict."""
        self._last_id += 1
        self.began = False
        job = {
            "id": self._last_id,
            "task": json.dumps(task),
            "response": response.encode("utf-8", "replace").decode(),
            "cpu_s": timeout_s + _CPU_GRACE_S,
            "import_cpu_s": import_timeout_s + _CPU_GRACE_S,
        }
        self._stdin.write(pack_frame(job))
        frame = await self._receive(import_timeout_s, "did not finish its imports")
        self.began = True
        if frame.get("ready"):
            frame = await self._receive(timeout_s, "gave no verdict")
        if frame.get("id") != self._last_id:
            raise self._broken("verifier process answered another job")
        if "error" in frame:
            self.usable = not frame.get("fatal", True)
            raise VerifierCrashError(str(frame["error"]))
        reward = frame.get("reward")
        if not isinstance(reward, float) or not math.isfinite(reward):
            raise self._broken(f"verifier process answered {reward!r}")
        return reward

    async def kill(self) -> None:
        """Kill the process and all it started, wherever they moved, and reap it."""
        self.usable = False
        descendants: list[psutil.Process] = []
        with suppress(psutil.Error):
            descendants = psutil.Process(self._process.pid).children(recursive=True)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for process in descendants:
            with suppress(psutil.Error):
                process.kill()
        self._stdin.close()
        await asyncio.gather(self._discard_output(), self._process.wait())

    async def _discard_output(self) -> None:
        """Read to the end: asyncio counts a process as gone only when its pipes are at their end.

        A reader whose buffer is full reads no more, so a flood would be waited for without end.
        """
        async with self._reading:
            with suppress(ConnectionError):
                while await self._stdout.read(1 << 16):
                    pass

    async def _receive(self, timeout_s: float, complaint: str) -> dict[str, Any]:
        try:
            async with asyncio.timeout(timeout_s):
                return await self._read()
        except TimeoutError:
            self.usable = False
            raise VerifierTimeoutError(f"verifier {complaint} within {timeout_s:g} s") from None
        except (asyncio.IncompleteReadError, ConnectionError):
            raise await self._died() from None
        except (ValueError, msgpack.UnpackException) as error:
            raise self._broken(f"verifier process sent garbage: {error}") from error

    async def _read(self) -> dict[str, Any]:
        with suppress(ConnectionError):  # it may have answered and left: its words come first
            await self._stdin.drain()
        async with self._reading:
            if not self.usable:
                raise ConnectionError("killed since")
            length = int.from_bytes(await self._stdout.readexactly(4), "little")
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {length} bytes")
            frame = msgpack.unpackb(await self._stdout.readexactly(length))
        if not isinstance(frame, dict):
            raise ValueError("a frame that is no map")
        return frame

    async def _died(self) -> VerifierCrashError:
        with suppress(TimeoutError):  # its own exit code says more than our signal
            async with asyncio.timeout(_EXIT_GRACE_S):
                await self._process.wait()
        await self.kill()
        code = self._process.returncode
        if code and 128 < code <= 128 + signal.SIGSYS:  # bubblewrap's way to say "by a signal"
            code = 128 - code
        how = f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"
        return self._broken(f"verifier process died ({how})")

    def _broken(self, message: str) -> VerifierCrashError:
        self.usable = False
        return VerifierCrashError(message)


def _child_environment() -> dict[str, str]:
    """The parent's, without ringasync's own (addresses, passwords), one thread for each library."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RINGASYNC_")}
    return kept | _LIBRARY_SETTINGS


def runs_foreign_code(verifier: str) -> bool:
    """Whether the verifier is a user's, or evaluates what the model wrote.

    Several of reasoning-gym's tasks call ``eval`` or sympy's ``parse_expr`` on the answer.
    """
    return verifier.startswith(("python:", "reasoning_gym"))
