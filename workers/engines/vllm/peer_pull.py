"""Takes a version's tensors out of the learner's memory; the other end is ``learner/peer_server``.

Runs in the staging thread of a process of vLLM's. Whatever goes wrong is a ``PeerError``, in time:
the caller then reads the published files.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence

import torch
import xxhash

from ringasync.errors import PeerError
from ringasync.records.weights import PeerOffer, TensorInfo, WeightManifest
from ringasync.weights import nccl, peer
from workers.engines.live_weights import DTYPES, digest

_LAUNCHED_CHUNKS = 2
"""One chunk is on its way while the digests of the one before are taken."""
_HASH_BYTES = 64 << 20
"""Page-locked buffer through which a device's tensors go to be hashed."""


def pull(
    manifest: WeightManifest, device: torch.device
) -> tuple[dict[str, torch.Tensor], dict[str, str], str]:
    """Tensors by HF name, digests of their bytes as received, and the way: ``socket``, ``nccl``.

    The tensors are on ``device``, or in main memory when they came over the socket; each digest
    equals the manifest's. Raises ``PeerError`` when that cannot be had within the offer's time.
    """
    offer = manifest.peer
    if offer is None:
        raise PeerError("the learner does not offer this version")
    if not offer.host_id or offer.host_id != peer.host_id():
        raise PeerError("the learner is on another host")
    shapes = {tensor.name: _empty(tensor) for tensor in manifest.tensors}
    connection = peer.Connection.to(offer.port, offer.timeout_s)
    with contextlib.ExitStack() as ends:
        ends.callback(connection.close)
        answer = _ask(connection, manifest, offer, device)
        by_nccl = answer.way == "nccl"
        try:
            place = device if by_nccl else torch.device("cpu")
            tensors = {name: torch.empty_like(one, device=place) for name, one in shapes.items()}
            if by_nccl:
                ends.enter_context(torch.cuda.device(device))
                pair = nccl.NcclPair(answer.nccl_id, 1, connection.wait_until)
                ends.callback(pair.abort)
                digests = _receive_by_nccl(connection, manifest, tensors, pair, device)
            else:
                digests = _receive(connection, manifest, tensors)
            _compare(manifest, digests)
        except (PeerError, RuntimeError) as error:  # RuntimeError: CUDA's, out of memory
            _say(connection, str(error))
            raise PeerError(str(error)) from error
        _say(connection, "")
        if by_nccl:
            connection.wait_closed()  # this end's buffers stay until the learner is done
    return tensors, digests, answer.way


def _ask(
    connection: peer.Connection, manifest: WeightManifest, offer: PeerOffer, device: torch.device
) -> peer.PullAnswer:
    on_cuda = device.type == "cuda"
    connection.send(
        peer.PullRequest(
            run=manifest.run,
            policy_version=manifest.policy_version,
            fence=manifest.fence,
            secret=offer.secret,
            device=str(torch.cuda.get_device_properties(device).uuid) if on_cuda else "",
            nccl_version=nccl.version() if on_cuda else 0,
        )
    )
    answer = connection.receive(peer.PullAnswer)
    if answer.refused:
        raise PeerError(f"the learner refused: {answer.refused}")
    if answer.way == "nccl" and not on_cuda:
        raise PeerError("the learner wants to send by NCCL into main memory")
    expected_bytes = sum(map(peer.tensor_bytes, manifest.tensors))
    if answer.total_bytes != expected_bytes:
        raise PeerError(
            f"the learner would send {answer.total_bytes} bytes, the manifest has {expected_bytes}"
        )
    return answer


def _empty(tensor: TensorInfo) -> torch.Tensor:
    """Its shape and dtype, without memory."""
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        raise PeerError(f"{tensor.name} has dtype {tensor.dtype}, which is not pulled")
    return torch.empty(tensor.shape, dtype=dtype, device="meta")


def _receive(
    connection: peer.Connection, manifest: WeightManifest, tensors: dict[str, torch.Tensor]
) -> dict[str, str]:
    for chunk in peer.chunks(manifest.tensors):
        for tensor in chunk:
            flat = tensors[tensor.name].reshape(-1).view(torch.uint8)
            connection.receive_into(memoryview(flat.numpy().data))
    return {name: digest(tensor, tensor.dtype) for name, tensor in tensors.items()}


def _receive_by_nccl(
    connection: peer.Connection,
    manifest: WeightManifest,
    tensors: dict[str, torch.Tensor],
    pair: nccl.NcclPair,
    device: torch.device,
) -> dict[str, str]:
    """Straight into the tensors, on a stream of its own beside generation's."""
    stream, hasher = torch.cuda.Stream(device), _DeviceHasher(device)  # type: ignore[no-untyped-call]
    # The memory was another tensor's before: whatever was queued for that comes first, and it is
    # nobody else's again before what is received has come, even if nobody waits for that.
    stream.wait_stream(torch.cuda.current_stream(device))
    for tensor in tensors.values():
        tensor.record_stream(stream)
    digests = {  # tensors without elements are in no chunk
        name: digest(tensor, tensor.dtype) for name, tensor in tensors.items() if not tensor.nbytes
    }
    launched: deque[tuple[torch.cuda.Event, Sequence[TensorInfo]]] = deque()

    def finish_oldest() -> None:
        event, chunk = launched.popleft()
        connection.wait_until(lambda: pair.is_well() and bool(event.query()))  # type: ignore[no-untyped-call]
        for one in chunk:
            digests[one.name] = hasher.digest(tensors[one.name])

    for chunk in peer.chunks(manifest.tensors):
        spans = [(tensors[one.name].data_ptr(), tensors[one.name].nbytes) for one in chunk]
        pair.receive(spans, stream.cuda_stream)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
        launched.append((event, chunk))
        if len(launched) == _LAUNCHED_CHUNKS:
            finish_oldest()
    while launched:
        finish_oldest()
    return digests


class _DeviceHasher:
    """xxh3_128 of tensors on a device, through one page-locked buffer, on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffer = torch.empty(_HASH_BYTES, dtype=torch.uint8, pin_memory=True)

    def digest(self, tensor: torch.Tensor) -> str:
        """As ``live_weights.digest``, of bytes that are there already."""
        hasher = xxhash.xxh3_128()
        for part in torch.split(tensor.reshape(-1).view(torch.uint8), _HASH_BYTES):
            target = self._buffer[: part.numel()]
            with torch.cuda.stream(self._stream):
                target.copy_(part, non_blocking=True)
            self._stream.synchronize()
            hasher.update(target.numpy().data)
        return hasher.hexdigest()


def _compare(manifest: WeightManifest, digests: dict[str, str]) -> None:
    wrong = [one.name for one in manifest.tensors if digests[one.name] != one.digest]
    if wrong:
        raise PeerError(f"{len(wrong)} tensors came with other bytes, {wrong[0]} among them")


def _say(connection: peer.Connection, problem: str) -> None:
    """The last word; a learner that is gone by now need not hear it."""
    try:
        connection.send(peer.PullDone(problem=problem))
    except PeerError:
        return
