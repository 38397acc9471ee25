"""What learner and worker say to each other when a worker pulls a version; no torch here.

One TCP connection on loopback for each pull. Every message is a 4-byte big-endian length and so
much JSON::

    worker   PullRequest   run, version, fence, the secret of the manifest, its CUDA device if any
    learner  PullAnswer    refused: why, or the way: ``socket`` or ``nccl`` with the group's id
    learner  the tensors' bytes in the manifest's order: on this socket, or by NCCL
    worker   PullDone      whether every digest was right

Nothing but messages of these three kinds is read as data, and the bytes are compared with the
manifest's digests by whoever received them. A connection has one deadline for all of it.
"""

from __future__ import annotations

import contextlib
import math
import select
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ringasync.errors import PeerError
from ringasync.records.weights import TensorInfo
from ringasync.weights.manifest import DTYPE_BYTES

LOOPBACK = "127.0.0.1"
REQUEST_TIMEOUT_S = 5.0
"""A connection that has not said within this what it wants is closed."""

_MAX_MESSAGE_BYTES = 64 << 10
_CHUNK_BYTES = 256 << 20
_CHUNK_TENSORS = 64
_POLL_S = 0.0005


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PullRequest(_Message):
    """``device``: UUID of the CUDA device that is to receive; empty: main memory.

    ``nccl_version`` is the worker's, 0 without: two versions of NCCL do not talk to each other.
    """

    protocol: Literal[1] = 1
    run: str = Field(max_length=200)
    policy_version: int
    fence: int
    secret: str = Field(max_length=128, repr=False)
    device: str = Field("", max_length=128)
    nccl_version: int = 0


class PullAnswer(_Message):
    """``refused`` is empty when the bytes follow; ``nccl_id`` is 128 bytes in hex."""

    refused: str = ""
    way: Literal["socket", "nccl"] = "socket"
    nccl_id: str = ""
    total_bytes: int = 0


class PullDone(_Message):
    """The receiver's last word. ``problem`` is empty when all digests were the manifest's."""

    problem: str = ""


M = TypeVar("M", bound=_Message)


def host_id() -> str:
    """Alike for two processes exactly when they run under one booted kernel; empty if unknown."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


def tensor_bytes(tensor: TensorInfo) -> int:
    """Size of a tensor's data. Raises ``PeerError`` for a dtype whose width is not known."""
    width = DTYPE_BYTES.get(tensor.dtype)
    if width is None:
        raise PeerError(f"{tensor.name} has dtype {tensor.dtype}, whose width is not known")
    return math.prod(tensor.shape) * width


def chunks(tensors: Sequence[TensorInfo]) -> Iterator[list[TensorInfo]]:
    """Tensors in order, so many at a time that both sides launch at once; the same on both.

    At most 64 tensors and, unless a single one is larger, 256 MiB. Empty tensors are left out.
    """
    chunk: list[TensorInfo] = []
    size_bytes = 0
    for tensor in tensors:
        more_bytes = tensor_bytes(tensor)
        if not more_bytes:
            continue
        if chunk and (len(chunk) == _CHUNK_TENSORS or size_bytes + more_bytes > _CHUNK_BYTES):
            yield chunk
            chunk, size_bytes = [], 0
        chunk.append(tensor)
        size_bytes += more_bytes
    if chunk:
        yield chunk


class Connection:
    """One end of a pull. Every call raises ``PeerError`` at the deadline or when the peer is gone.

    Not for several threads, but for ``cut``.
    """

    def __init__(self, sock: socket.socket, timeout_s: float) -> None:
        self._sock = sock
        self._timeout_s = timeout_s
        self._deadline_s = time.monotonic() + timeout_s
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @classmethod
    def to(cls, port: int, timeout_s: float) -> Connection:
        """Connect to a learner of this host."""
        try:
            return cls(socket.create_connection((LOOPBACK, port), timeout=timeout_s), timeout_s)
        except OSError as error:
            raise PeerError(f"the learner does not answer at {LOOPBACK}:{port}: {error}") from error

    def left_s(self) -> float:
        """Seconds to the deadline."""
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise PeerError(f"not done within {self._timeout_s:g} s (weights.peer_timeout_s)")
        return left_s

    def send(self, message: _Message) -> None:
        """Send one message."""
        data = message.model_dump_json().encode()
        self.send_bytes(memoryview(len(data).to_bytes(4, "big") + data))

    def receive(self, kind: type[M], within_s: float = math.inf) -> M:
        """The next message, which must be of this kind; ``within_s`` shortens the deadline."""
        until_s = time.monotonic() + within_s
        length = int.from_bytes(self._exactly(4, until_s), "big")
        if length > _MAX_MESSAGE_BYTES:
            raise PeerError(
                f"a message of {length} bytes was announced: that is no {kind.__name__}"
            )
        try:
            return kind.model_validate_json(bytes(self._exactly(length, until_s)))
        except ValidationError as error:
            raise PeerError(
                f"what came is no {kind.__name__}: {error.error_count()} errors"
            ) from None

    def send_bytes(self, data: memoryview) -> None:
        """Send raw bytes."""
        with self._broken():
            self._sock.settimeout(self.left_s())
            self._sock.sendall(data)

    def receive_into(self, target: memoryview, until_s: float = math.inf) -> None:
        """Fill ``target`` (bytes, writable)."""
        with self._broken():
            while len(target):
                self._sock.settimeout(min(self.left_s(), max(1e-3, until_s - time.monotonic())))
                count = self._sock.recv_into(target)
                if not count:
                    raise PeerError("the other side closed the connection")
                target = target[count:]

    def wait_until(self, done: Callable[[], bool]) -> None:
        """Poll ``done`` (a CUDA event, say) while the peer lives and there is time."""
        while not done():
            self.left_s()
            with self._broken():
                readable, _, _ = select.select([self._sock], [], [], _POLL_S)
                if readable and not self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                    raise PeerError("the other side closed the connection")
                if readable:  # its last word lies there already: nothing to be woken by
                    time.sleep(_POLL_S)

    def wait_closed(self) -> None:
        """Wait until the peer has closed its end, or the deadline."""
        with contextlib.suppress(PeerError):
            self._exactly(1, math.inf)

    def cut(self) -> None:
        """Break off, also from another thread: whoever waits here gets a ``PeerError``."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Free the socket."""
        self._sock.close()

    def _exactly(self, count: int, until_s: float) -> bytearray:
        data = bytearray(count)
        self.receive_into(memoryview(data), until_s)
        return data

    @contextlib.contextmanager
    def _broken(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise PeerError(
                f"the other side was silent for too long (at most {self._timeout_s:g} s in all)"
            ) from None
        except (OSError, ValueError) as error:  # ValueError: closed while select looked at it
            raise PeerError(f"the connection broke: {error}") from error
