"""Two NCCL ranks that send each other bytes, through the NCCL library itself. No torch here.

Not ``torch.distributed``: its watchdog ends the whole process when an operation times out, and its
TCPStore listens on a port for anybody. Here the group's id travels over a connection that knows who
is there, and every step is started without blocking and polled by the caller, who aborts the group
when the peer is dead or late. NCCL refuses two ranks on one GPU.

Pointers and streams are plain integers (``data_ptr()``, ``cuda_stream``); the calling thread's
current CUDA device must be the rank's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from ringasync.errors import PeerError

_ID_BYTES = 128
_SUCCESS, _IN_PROGRESS = 0, 7
_UINT8 = 1
_CONFIG_MAGIC = 0xCAFEBEEF
_CONFIG_VERSION = 21400
"""NCCL 2.14, the first with ``blocking``; a later library gives what follows its defaults."""

Wait = Callable[[Callable[[], bool]], None]
"""Polls until a condition holds; raises ``PeerError`` when it should not be waited for any more."""
Span = tuple[int, int]
"""Device pointer and number of bytes (above 0)."""


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_ubyte * _ID_BYTES),)


class _Config(ctypes.Structure):
    """The head of ``ncclConfig_t`` as of NCCL 2.14."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
    )


@lru_cache(maxsize=1)
def _library() -> Any:
    """The NCCL that torch has loaded, or another on the loader's path. Raises ``OSError``."""
    library = ctypes.CDLL("libnccl.so.2")
    pointer = ctypes.c_void_p
    span = [pointer, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, pointer, pointer]
    for name, arguments in {
        "ncclGetVersion": [ctypes.POINTER(ctypes.c_int)],
        "ncclGetUniqueId": [ctypes.POINTER(_UniqueId)],
        "ncclCommInitRankConfig": [
            ctypes.POINTER(pointer),
            ctypes.c_int,
            _UniqueId,
            ctypes.c_int,
            ctypes.POINTER(_Config),
        ],
        "ncclCommGetAsyncError": [pointer, ctypes.POINTER(ctypes.c_int)],
        "ncclCommAbort": [pointer],
        "ncclGroupStart": [],
        "ncclGroupEnd": [],
        "ncclSend": span,
        "ncclRecv": span,
    }.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_int
    library.ncclGetErrorString.restype = ctypes.c_char_p
    return library


def version() -> int:
    """NCCL's version (22703: 2.27.3), which both ranks must share; 0 where none can be loaded.

    Import torch first: it brings one.
    """
    found = ctypes.c_int(0)
    try:
        _check(_library().ncclGetVersion(ctypes.byref(found)), "ncclGetVersion")
    except (OSError, AttributeError, PeerError):
        return 0
    return found.value


def new_id() -> str:
    """A fresh group's id in hex; the process that makes it should be rank 0."""
    unique = _UniqueId()
    _check(_library().ncclGetUniqueId(ctypes.byref(unique)), "ncclGetUniqueId")
    return bytes(unique.internal).hex()


class NcclPair:
    """One of two ranks. Ranks must make the same groups in the same order; always ``abort``."""

    def __init__(self, group_id: str, rank: int, wait: Wait) -> None:
        """Join the group (``new_id``) as ``rank`` 0 or 1.

        Waits for the other rank as long as ``wait`` does. Raises ``PeerError``.
        """
        try:
            raw = bytes.fromhex(group_id)
            unique = _UniqueId.from_buffer_copy(raw)
        except ValueError:
            raise PeerError("the learner's NCCL id is not 128 bytes in hex") from None
        self._peer = 1 - rank
        self._wait = wait
        self._comm = ctypes.c_void_p()
        config = _Config(ctypes.sizeof(_Config), _CONFIG_MAGIC, _CONFIG_VERSION, 0)
        try:
            self._settle(
                _library().ncclCommInitRankConfig(
                    ctypes.byref(self._comm), 2, unique, rank, ctypes.byref(config)
                ),
                "ncclCommInitRankConfig",
            )
        except PeerError:
            self.abort()
            raise

    def send(self, spans: Sequence[Span], stream: int) -> None:
        """Queue one group of sends on a CUDA stream; returns when it is launched, not done."""
        self._group(_library().ncclSend, spans, stream, "ncclSend")

    def receive(self, spans: Sequence[Span], stream: int) -> None:
        """Queue one group of receives; see ``send``."""
        self._group(_library().ncclRecv, spans, stream, "ncclRecv")

    def is_well(self) -> bool:
        """True; raises ``PeerError`` when NCCL has found the group broken."""
        state = ctypes.c_int(_SUCCESS)
        _check(_library().ncclCommGetAsyncError(self._comm, ctypes.byref(state)), "NCCL")
        if state.value not in (_SUCCESS, _IN_PROGRESS):
            _check(state.value, "NCCL")
        return True

    def abort(self) -> None:
        """End what still runs and free the group; needs no answer of the other rank.

        While the other rank may still read this one's buffers it breaks that transfer.
        """
        comm, self._comm = self._comm, ctypes.c_void_p()
        if comm:
            _library().ncclCommAbort(comm)

    def _group(self, call: Any, spans: Sequence[Span], stream: int, name: str) -> None:
        library = _library()
        _check(library.ncclGroupStart(), "ncclGroupStart")
        codes = [
            call(pointer, count, _UINT8, self._peer, self._comm, stream) for pointer, count in spans
        ]
        codes.append(library.ncclGroupEnd())  # always: a group left open would swallow what follows
        for code in codes:
            _check(code, name, also=_IN_PROGRESS)
        self._settle(_IN_PROGRESS, name)

    def _settle(self, code: int, name: str) -> None:
        """Wait until the group has taken up what was asked of it."""
        _check(code, name, also=_IN_PROGRESS)
        state = ctypes.c_int(_IN_PROGRESS)

        def is_settled() -> bool:
            _check(_library().ncclCommGetAsyncError(self._comm, ctypes.byref(state)), name)
            return state.value != _IN_PROGRESS

        self._wait(is_settled)
        _check(state.value, name)


def _check(code: int, name: str, *, also: int = _SUCCESS) -> None:
    if code not in (_SUCCESS, also):
        said = _library().ncclGetErrorString(code)
        raise PeerError(f"{name} failed: {said.decode() if said else code}")
