"""The command line that puts a verifier's process into a bubblewrap sandbox, and whether it works.

No network, a read-only file system of what Python needs, an own process table, a small ``/tmp``,
and a filter of system calls that refuses new processes. See docs/sandbox.md for the threat model.
"""

from __future__ import annotations

import os
import platform
import shutil
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SCRATCH_BYTES = 16 << 20
"""Size of the sandbox's ``/tmp``, which is memory; also the longest file in it."""

PROBE_TIMEOUT_S = 30.0

_SYSTEM_PATHS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
_SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime")
_KEPT_VARIABLES = frozenset({"PATH", "PYTHONPATH", "PYTHONHASHSEED", "LANG", "LANGUAGE", "TZ"})

# What a verifier never needs and could escape, or outgrow its memory limit, with: namespaces,
# mounts, other processes' memory, kernel keys, io_uring (skips filters), shared memory.
_REFUSED_X86_64 = (57, 58, 272, 308, 165, 101, 250, 248, 249, 321, 298, 323, 310, 311)
_REFUSED_AARCH64 = (97, 268, 40, 117, 219, 217, 218, 280, 241, 282, 270, 271)
_AUDIT_X86_64, _AUDIT_AARCH64 = 0xC000003E, 0xC00000B7
_CLONE3, _IO_URING_SETUP = 435, 425
_CLONE_THREAD = 0x10000
_X32_BIT = 0x40000000
_EPERM, _ENOSYS = 1, 38


@dataclass(frozen=True, slots=True)
class _Machine:
    audit: int
    clone: int
    refused: tuple[int, ...]


_MACHINES = {
    # the last four and three: memfd_create, shmget, semget, msgget
    "x86_64": _Machine(_AUDIT_X86_64, 56, (*_REFUSED_X86_64, 319, 29, 64, 68)),
    "aarch64": _Machine(_AUDIT_AARCH64, 220, (*_REFUSED_AARCH64, 279, 194, 190, 186)),
}

_PROBE = """
import os, socket, sys
for attempt in (os.fork, lambda: open(sys.argv[1], 'w')):
    try:
        attempt()
    except OSError:
        continue
    os._exit(9)
os._exit(9 if [name for _, name in socket.if_nameindex() if name != 'lo'] else 0)
"""


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A way to isolate that was tried on this host; ``readable``: folders beside Python's own.

    ``has_proc``: with a ``/proc`` of its own and another host name. Containers forbid both, and the
    container's ``/proc`` would show the passwords in other processes' environments: then there is
    none.
    """

    binary: str
    readable: tuple[str, ...] = ()
    has_proc: bool = True

    def command(self, command: Sequence[str], seccomp_descriptor: int) -> list[str]:
        """``command`` inside the sandbox; the descriptor gives ``seccomp_program``'s bytes."""
        folders, links = _visible(self.readable)
        arguments = [self.binary, "--unshare-user", "--unshare-all", "--die-with-parent"]
        arguments += ["--new-session", "--cap-drop", "ALL", "--dev", "/dev"]
        if self.has_proc:
            arguments += ["--hostname", "sandbox", "--proc", "/proc"]
        arguments += ["--size", str(SCRATCH_BYTES), "--tmpfs", "/tmp"]  # noqa: S108
        for path in (*_SYSTEM_PATHS, *_SYSTEM_FILES):
            arguments += ["--ro-bind-try", path, path]
        for path in folders:
            arguments += ["--ro-bind", path, path]
        for path, target in links:
            arguments += ["--symlink", target, path]
        # The root and /dev are memory without a limit of their own.
        arguments += ["--remount-ro", "/dev", "--remount-ro", "/"]
        here = os.getcwd()
        arguments += ["--chdir", here if _within(os.path.realpath(here), folders) else "/tmp"]  # noqa: S108
        return [*arguments, "--seccomp", str(seccomp_descriptor), "--", *command]


def sandbox_environment(parent: Mapping[str, str]) -> dict[str, str]:
    """Of the parent's variables only harmless ones: a list of what is let in, not of secrets."""
    kept = {k: v for k, v in parent.items() if k in _KEPT_VARIABLES or k.startswith("LC_")}
    return kept | {"HOME": "/tmp", "TMPDIR": "/tmp"}  # noqa: S108


def seccomp_pipe() -> int:
    """The read end of a pipe that holds the filter; the caller closes it after the start."""
    reader, writer = os.pipe()
    os.write(writer, seccomp_program(_MACHINES[platform.machine()]))
    os.close(writer)
    return reader


def seccomp_program(machine: _Machine) -> bytes:
    """Classic BPF, 8 bytes an instruction: threads pass, new processes and the list do not.

    ``clone3`` answers "no such call", as its flags lie in memory that a filter cannot read; libc
    then uses ``clone``.
    """
    load, equal, at_least, has_bits, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, error = 0x7FFF0000, 0x80000000, 0x00050000
    code = [
        (load, 0, 0, 4),
        (equal, 1, 0, machine.audit),
        (answer, 0, 0, kill),
        (load, 0, 0, 0),
        (at_least, 0, 1, _X32_BIT),
        (answer, 0, 0, kill),
        (equal, 0, 1, _CLONE3),
        (answer, 0, 0, error | _ENOSYS),
    ]
    for number in (*machine.refused, _IO_URING_SETUP):
        code += [(equal, 0, 1, number), (answer, 0, 0, error | _EPERM)]
    code += [
        (equal, 0, 3, machine.clone),
        (load, 0, 0, 16),
        (has_bits, 1, 0, _CLONE_THREAD),
        (answer, 0, 0, error | _EPERM),
        (answer, 0, 0, allow),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def find_sandbox(readable: Sequence[str] = ()) -> Sandbox | str:
    """A sandbox that was tried just now (once a process), or why this host has none."""
    return _tried(tuple(readable))


@cache
def _tried(readable: tuple[str, ...]) -> Sandbox | str:
    binary = shutil.which("bwrap")
    if binary is None:
        return "bubblewrap (bwrap) is not installed; it comes with the system's packages"
    if platform.machine() not in _MACHINES:
        return f"no filter of system calls is known for {platform.machine()}"
    sandbox = Sandbox(binary, readable)
    if why := _refusal(sandbox):
        sandbox = Sandbox(binary, readable, has_proc=False)
        if _refusal(sandbox):
            return why
    return sandbox


def _refusal(sandbox: Sandbox) -> str:
    """Why a sandbox does not isolate here; empty when it does."""
    descriptor = seccomp_pipe()
    try:
        done = subprocess.run(  # noqa: S603  # a fixed command, no shell
            sandbox.command(
                [sys.executable, "-I", "-c", _PROBE, "/escaped"], seccomp_descriptor=descriptor
            ),
            pass_fds=(descriptor,),
            env=sandbox_environment(os.environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PROBE_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"bubblewrap cannot be run: {error}"
    finally:
        os.close(descriptor)
    if not done.returncode:
        return ""
    said = done.stderr.decode(errors="replace").strip()[-500:]
    return f"bubblewrap does not isolate here (exit code {done.returncode}): {said}"


def _visible(readable: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Real folders to show, none inside another, and links by which Python names them."""
    package = str(Path(__file__).parents[1])
    bases = [sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib"), package]
    named = [*bases, *sys.path, os.getcwd(), *readable]
    wanted = {os.path.abspath(path) for path in named if os.path.exists(path or ".")}
    real = {os.path.realpath(path) for path in wanted}
    folders: list[str] = []
    for path in sorted(real, key=len):
        if not _too_wide(path) and not _within(path, [*folders, *_SYSTEM_PATHS]):
            folders.append(path)
    links = [
        (path, os.path.realpath(path))
        for path in sorted(wanted)
        if os.path.islink(path) and not _within(path, [*folders, *_SYSTEM_PATHS])
    ]
    return folders, links


def _too_wide(path: str) -> bool:
    """Whole homes and the root hold keys and passwords: never shown, not even to read."""
    home = os.path.realpath(Path.home())
    return _within(home, [path]) or path in ("/", "/etc", "/home", "/root", "/proc", "/run", "/tmp")  # noqa: S108


def _within(path: str, folders: Sequence[str]) -> bool:
    return any(path == folder or path.startswith(folder.rstrip("/") + "/") for folder in folders)
