"""Serves published tensors out of the learner's memory to workers of its host that pull them.

The training loop only calls ``offer``; threads of this server do the rest. What is served is read
back from the published files, so that names, dtypes and bytes are those of the manifest whatever
the backend or the architecture; it comes out of the page cache, right after it was written there.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import structlog
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from learner.devices import resolve_device
from ringasync.config.schema import Config
from ringasync.errors import PeerError
from ringasync.records.weights import PeerOffer, TensorInfo, WeightManifest
from ringasync.weights import nccl, peer
from ringasync.weights.manifest import version_name

_DEVICE_SHARE = 0.25
"""``auto`` holds a version on the device when it takes at most this share of its free memory."""
_MAX_CONNECTIONS = 64
_LAUNCHED_CHUNKS = 2
"""So many groups are on the stream at once: one is sent while the next is being launched."""


@dataclass(eq=False)
class _Held:
    """One version in memory. ``problem`` says why it cannot be served once ``ready`` is set."""

    manifest: WeightManifest
    secret: str
    ready: threading.Event = field(default_factory=threading.Event)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    problem: str = ""
    pulls: set[peer.Connection] = field(default_factory=set)


class PeerServer:
    """Holds the newest version, and the one before it while somebody still pulls that."""

    def __init__(
        self,
        root: Path,
        device: str = "cpu",
        *,
        timeout_s: float = 60.0,
        serve_from: Literal["auto", "device", "host"] = "auto",
    ) -> None:
        """``root`` is the file transport's folder; ``device`` the learner's. Listens at once."""
        self._root = root
        self._device = device
        self._timeout_s = timeout_s
        self._serve_from = serve_from
        self._lock = threading.Lock()
        self._newest: _Held | None = None
        self._before: _Held | None = None
        self._places = threading.Semaphore(_MAX_CONNECTIONS)
        self._log = structlog.get_logger(__name__)
        self._listener = socket.create_server((peer.LOOPBACK, 0))
        self._port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="peer-server", daemon=True).start()

    @classmethod
    def of(cls, config: Config) -> PeerServer:
        """As the configuration asks for it."""
        return cls(
            config.run_dir / "weights",
            config.learner.device,
            timeout_s=config.weights.peer_timeout_s,
            serve_from=config.weights.serve_from,
        )

    def offer(self, manifest: WeightManifest) -> WeightManifest:
        """Serve a version that was just published; returns its manifest with the offer.

        Does not wait: a thread reads the tensors, and who asks before it is done waits for it. The
        newest version takes the place of the one before, whose pulls under way go on; older ones
        are cut off, so that never more than two are held.
        """
        held = _Held(manifest, secrets.token_hex(32))
        with self._lock:
            oldest, self._before, self._newest = self._before, self._newest, held
            self._drop_if_idle()
            for connection in oldest.pulls if oldest is not None else ():
                connection.cut()
        threading.Thread(target=self._load, args=(held,), name="peer-load", daemon=True).start()
        offer = PeerOffer(
            host_id=peer.host_id(),
            port=self._port,
            secret=held.secret,
            timeout_s=self._timeout_s,
        )
        return manifest.model_copy(update={"peer": offer})

    @property
    def held_versions(self) -> list[int]:
        """Policy versions in memory, newest first."""
        with self._lock:
            versions = [self._newest, self._before]
            return [held.manifest.policy_version for held in versions if held is not None]

    def close(self) -> None:
        """Listen no more and cut pulls off."""
        with contextlib.suppress(OSError):  # wakes the thread that accepts
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for held in (self._newest, self._before):
                for connection in held.pulls if held is not None else ():
                    connection.cut()
            self._newest = self._before = None

    # Loading.

    def _load(self, held: _Held) -> None:
        folder = self._root / version_name(held.manifest.policy_version, held.manifest.fence)
        size_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        try:
            device = self._place(size_bytes)
            for path in sorted(folder.glob("*.safetensors")):
                with safe_open(path, framework="pt", device=str(device)) as file:
                    for name in file.keys():  # noqa: SIM118 (not a dict)
                        held.tensors[name] = file.get_tensor(name)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            missing = {tensor.name for tensor in held.manifest.tensors} - set(held.tensors)
            if missing:
                held.problem = f"it lacks {len(missing)} tensors, {min(missing)} among them"
        except (OSError, SafetensorError, RuntimeError) as error:  # out of memory is among them
            held.tensors.clear()
            held.problem = f"the learner cannot hold it: {error}"
        if held.problem:
            self._log.warning(
                "version is served by file only",
                version=held.manifest.policy_version,
                why=held.problem,
            )
        held.ready.set()

    def _place(self, size_bytes: int) -> torch.device:
        """Host: the files stay mapped, which costs no memory but the page cache."""
        device = resolve_device(self._device)
        if device.type != "cuda" or self._serve_from == "host":
            return torch.device("cpu")
        free_bytes, _ = torch.cuda.mem_get_info(device)
        if self._serve_from == "auto" and size_bytes > _DEVICE_SHARE * free_bytes:
            return torch.device("cpu")
        return device

    def _drop_if_idle(self) -> None:
        """Let the version before go when nobody pulls it. Call with the lock held."""
        if self._before is not None and not self._before.pulls:
            self._before = None

    # Serving.

    def _accept(self) -> None:
        """Consumes: connections. Produces: a thread for each. Ended by ``close``."""
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            if not self._places.acquire(blocking=False):
                sock.close()
                continue
            threading.Thread(target=self._serve, args=(sock,), name="peer", daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        """One pull. Waits for: the version to be read, the peer. Unblocked by: the deadline."""
        try:
            connection = peer.Connection(sock, self._timeout_s)
            try:
                self._answer(connection)
            except (PeerError, RuntimeError) as error:  # RuntimeError: CUDA's
                self._log.info("a pull of weights ended early", why=str(error))
            finally:
                connection.close()
        except OSError as error:  # gone before it was looked at
            self._log.info("a pull of weights ended early", why=str(error))
            sock.close()
        finally:
            self._places.release()

    def _answer(self, connection: peer.Connection) -> None:
        request = connection.receive(peer.PullRequest, peer.REQUEST_TIMEOUT_S)
        with self._pulling(request, connection) as found:
            if isinstance(found, str):
                connection.send(peer.PullAnswer(refused=found))
                raise PeerError(f"refused: {found}")
            if not found.ready.wait(connection.left_s()):
                raise PeerError("the version was still being read at the deadline")
            if found.problem:
                connection.send(peer.PullAnswer(refused=found.problem))
                raise PeerError(found.problem)
            with contextlib.ExitStack() as group:  # its buffers stay until the worker is done
                way = self._send(connection, found, request, group)
                problem = connection.receive(peer.PullDone).problem
        if problem:
            raise PeerError(f"the worker refused what it got: {problem}")
        self._log.debug("weights pulled", version=request.policy_version, way=way)

    @contextlib.contextmanager
    def _pulling(
        self, request: peer.PullRequest, connection: peer.Connection
    ) -> Iterator[_Held | str]:
        """The version asked for, kept while it is pulled; or why it is refused."""
        asked = (request.run, request.policy_version, request.fence)
        with self._lock:
            held = next(
                (
                    each
                    for each in (self._newest, self._before)
                    if each is not None
                    and (each.manifest.run, each.manifest.policy_version, each.manifest.fence)
                    == asked
                ),
                None,
            )
            good = held is not None and secrets.compare_digest(
                held.secret.encode(), request.secret.encode()
            )
            if held is not None and good:
                held.pulls.add(connection)
        if held is None:
            yield f"version {request.policy_version} (fence {request.fence}) is not held here"
            return
        if not good:
            yield "wrong secret"
            return
        try:
            yield held
        finally:
            with self._lock:
                held.pulls.discard(connection)
                self._drop_if_idle()

    def _send(
        self,
        connection: peer.Connection,
        held: _Held,
        request: peer.PullRequest,
        group: contextlib.ExitStack,
    ) -> str:
        """All tensors in the manifest's order; returns the way they went."""
        tensors = held.manifest.tensors
        total_bytes = sum(map(peer.tensor_bytes, tensors))
        own = resolve_device(self._device)
        if own.type == "cuda" and _can_meet(own, request):
            group.enter_context(torch.cuda.device(own))
            group_id = nccl.new_id()
            connection.send(peer.PullAnswer(way="nccl", nccl_id=group_id, total_bytes=total_bytes))
            pair = nccl.NcclPair(group_id, 0, connection.wait_until)
            group.callback(pair.abort)
            _send_by_nccl(connection, held, pair, own)
            return "nccl"
        connection.send(peer.PullAnswer(total_bytes=total_bytes))
        for chunk in peer.chunks(tensors):
            for tensor in chunk:
                connection.send_bytes(_bytes(held.tensors[tensor.name].cpu()))
        return "socket"


def _can_meet(own: torch.device, request: peer.PullRequest) -> bool:
    """Whether NCCL can join the two devices: not the same one, and one NCCL on both sides."""
    other = request.device not in ("", str(torch.cuda.get_device_properties(own).uuid))
    return other and request.nccl_version == nccl.version() != 0


def _send_by_nccl(
    connection: peer.Connection, held: _Held, pair: nccl.NcclPair, device: torch.device
) -> None:
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    launched: deque[tuple[torch.cuda.Event, Sequence[Tensor]]] = deque()

    def finish_oldest() -> None:
        event, _ = launched[0]
        connection.wait_until(lambda: pair.is_well() and bool(event.query()))  # type: ignore[no-untyped-call]
        launched.popleft()

    for chunk in peer.chunks(held.manifest.tensors):
        tensors = _on_device(held, chunk, device, stream)
        pair.send([(one.data_ptr(), one.nbytes) for one in tensors], stream.cuda_stream)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
        launched.append((event, tensors))
        if len(launched) == _LAUNCHED_CHUNKS:
            finish_oldest()
    while launched:
        finish_oldest()


def _on_device(
    held: _Held, chunk: Sequence[TensorInfo], device: torch.device, stream: torch.cuda.Stream
) -> list[Tensor]:
    with torch.cuda.stream(stream):
        return [held.tensors[tensor.name].contiguous().to(device) for tensor in chunk]


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
