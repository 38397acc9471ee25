"""A verifier's process: reads jobs from stdin, answers on stdout, under hard limits.

Run as ``python -m ringasync.rewards.child LIMITS_JSON`` by ``pool``, in its own session. Frames
are a 4-byte little-endian length and a msgpack map. For each job the child sends ``ready`` once the
verifier's modules are imported, then the verdict::

    pool  -> child   {id, task: JSON text, response, cpu_s, import_cpu_s}
    child -> pool    {hello: 1}    {id, ready: true}    {id, reward} | {id, error, fatal}

What a verifier prints goes nowhere: the real stdout is kept under another descriptor. This keeps
accidents away (hangs, leaks, stray files and processes); ``isolation`` jails hostile code.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import math
import os
import resource
import signal
import sys
from typing import Any, BinaryIO, NoReturn

import msgpack

MAX_FRAME_BYTES = 64 << 20
MAX_ERROR_CHARS = 2000
_LENGTH_BYTES = 4
_OPEN_FILES = 256
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_REFUSED_EVENTS = frozenset(
    {"os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system", "pty.spawn"}
    | {"os.exec", "subprocess.Popen"}
)
_LIBRARIES = ("reasoning_gym", "math_verify")


def read_frame(stream: BinaryIO) -> dict[str, Any] | None:
    """The next frame, or None at the end of the stream (the pool is gone)."""
    head = stream.read(_LENGTH_BYTES)
    if len(head) < _LENGTH_BYTES:
        return None
    body = stream.read(int.from_bytes(head, "little"))
    frame: dict[str, Any] = msgpack.unpackb(body)
    return frame


def pack_frame(fields: dict[str, Any]) -> bytes:
    """Length and msgpack map of one frame."""
    body = bytes(msgpack.packb(fields))
    return len(body).to_bytes(_LENGTH_BYTES, "little") + body


def main() -> None:
    """Consumes: jobs from stdin. Produces: verdicts. Ends with stdin or with its parent."""
    limits = json.loads(sys.argv[1])
    jobs = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    _silence()
    _die_with_parent(int(limits["parent_pid"]))
    _limit(int(limits["memory_bytes"]), int(limits["file_bytes"]))
    replies.write(pack_frame({"hello": 1}))
    while (job := read_frame(jobs)) is not None:
        reply = _answer(job, replies)
        replies.write(pack_frame(reply))
        if reply.get("fatal"):
            break


def _answer(job: dict[str, Any], replies: Any) -> dict[str, Any]:
    """One job's verdict. Whatever the verifier raises, even SystemExit, is an error and no zero."""
    pid = os.getpid()
    try:
        _limit_cpu(float(job["import_cpu_s"]))
        task = json.loads(job["task"])
        verifiers = _prepare(task)
        _limit_cpu(float(job["cpu_s"]))
        replies.write(pack_frame({"id": job["id"], "ready": True}))
        reward = _finite(verifiers.verify(task, job["response"]))
        if _left_processes():
            raise SystemExit("left processes behind")
    except MemoryError:
        return {"id": job["id"], "error": "verifier exceeded its memory limit", "fatal": True}
    except BaseException as error:
        text = f"verifier raised {type(error).__name__}: {error}"[:MAX_ERROR_CHARS]
        return {"id": job["id"], "error": text, "fatal": not isinstance(error, Exception)}
    finally:
        if os.getpid() != pid:  # a copy that a fork in native code made: one answer is enough
            os._exit(1)
        signal.setitimer(signal.ITIMER_REAL, 0)
    return {"id": job["id"], "reward": reward}


def _left_processes() -> bool:
    """Whether the verifier started processes behind the audit hook's back, ended or not."""
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return False
    return True


def _prepare(task: dict[str, Any]) -> Any:
    """Import what the verifier needs, before its own time limit begins to run."""
    verifier = str(task.get("verifier", ""))
    for library in _LIBRARIES:
        if verifier.startswith(library):
            importlib.import_module(library)
    if verifier.startswith("python:"):
        importlib.import_module(verifier.split(":")[1])
    return importlib.import_module("ringasync.rewards.verifiers")


def _finite(verdict: Any) -> float:
    """The verdict as a number. Raises ``ValueError`` on None, text, NaN, infinity."""
    try:
        reward = float(verdict) if not isinstance(verdict, str | bytes) else math.nan
    except (TypeError, ValueError):
        reward = math.nan
    if not math.isfinite(reward):
        raise ValueError(f"verdict {verdict!r} is not a finite number")
    return reward


def _silence() -> None:
    """Point stdin, stdout and stderr at nothing; frames use descriptors of their own."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)


def _die_with_parent(parent_pid: int) -> None:
    """Linux: be killed when the pool's process dies, and adopt grandchildren so they are found."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    if parent_pid and os.getppid() != parent_pid:
        sys.exit(0)


def _limit(memory_bytes: int, file_bytes: int) -> None:
    """Memory, file contents, open files, no core dumps, no processes (threads are allowed)."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    if file_bytes:  # pipes and sockets hold memory that nothing else counts
        resource.setrlimit(resource.RLIMIT_NOFILE, (_OPEN_FILES, _OPEN_FILES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(_refuse_processes)


def _refuse_processes(event: str, _args: tuple[Any, ...]) -> None:
    """Why not RLIMIT_NPROC: it counts a user's threads on the whole machine and spares root."""
    if event in _REFUSED_EVENTS:
        _refuse(event)


def _refuse(event: str) -> NoReturn:
    raise PermissionError(f"a verifier must not start processes ({event})")


def _limit_cpu(cpu_s: float) -> None:
    """Kill this process after ``cpu_s`` more seconds of CPU: a backstop if nobody watches it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime + cpu_s)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


if __name__ == "__main__":
    main()
