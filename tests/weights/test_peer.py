"""Tensors pulled out of a learner's memory: exact, or refused in time for the files to be read."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from learner.peer_server import PeerServer
from ringasync.errors import PeerError
from ringasync.records.weights import WeightManifest
from ringasync.weights import nccl, peer
from ringasync.weights.file_transport import FileTransport
from ringasync.weights.manifest import VersionFields, dump_manifest, load_manifest
from workers.engines.vllm.peer_pull import pull
from workers.engines.vllm.staging import Staged, Stager

FolderMaker = Callable[..., Path]
CPU = torch.device("cpu")
BULK_BYTES = 32 << 20
"""Far more than the sockets' buffers hold, so that a sender waits for its receiver."""
DEADLINE_S = 20.0
CHILD = Path(__file__).with_name("peer_child.py")


async def publish(root: Path, source: Path, version: int = 1) -> WeightManifest:
    return await FileTransport(root).publish(source, VersionFields("demo", version, version, 0, 3))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "weights"


@pytest.fixture
async def manifest(root: Path, make_folder: FolderMaker) -> WeightManifest:
    """Version 1, with one large tensor, published."""
    return await publish(root, make_folder("a", seed=1, extra_bytes=BULK_BYTES))


@contextmanager
def serving(root: Path, timeout_s: float = DEADLINE_S) -> Iterator[PeerServer]:
    server = PeerServer(root, timeout_s=timeout_s)
    yield server
    server.close()


@contextmanager
def child(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, str(CHILD), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield process
        process.kill()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, "the child ended"
    return line


def wait_for(condition: Callable[[], bool]) -> None:
    until_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.005)


def staged(folder: Path, manifest: WeightManifest) -> Staged:
    """What a stager holds at the end."""
    stager = Stager()
    stager.begin(folder, "auto", CPU, manifest)
    wait_for(lambda: stager.state != "reading")
    assert stager.state == "ready", stager.state
    assert stager.staged is not None
    return stager.staged


def assert_equal_to_folder(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    expected = load_file(folder / "model.safetensors")
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor), name


def offered_by(manifest: WeightManifest, port: int, timeout_s: float) -> WeightManifest:
    offer = {"host_id": peer.host_id(), "port": port, "secret": "s", "timeout_s": timeout_s}
    return WeightManifest.model_validate(manifest.model_dump() | {"peer": offer})


def answer_to(offered: WeightManifest, **changes: object) -> peer.PullAnswer:
    """What the server answers to a request, right but for ``changes``."""
    assert offered.peer is not None
    right = {
        "run": offered.run,
        "policy_version": offered.policy_version,
        "fence": offered.fence,
        "secret": offered.peer.secret,
    }
    connection = peer.Connection.to(offered.peer.port, DEADLINE_S)
    connection.send(peer.PullRequest.model_validate(right | changes))
    answer = connection.receive(peer.PullAnswer)
    connection.close()
    return answer


def test_a_version_pulled_from_another_process_is_the_folder_bit_for_bit(
    root: Path, manifest: WeightManifest
) -> None:
    with child("learner", root, "v000001-f3", DEADLINE_S, "serves", "cpu") as learner:
        offered = load_manifest(said(learner))
        tensors, digests, way = pull(offered, CPU)
        assert way == "socket"
        assert_equal_to_folder(tensors, root / "v000001-f3")
        assert digests == {one.name: one.digest for one in manifest.tensors}
        found = staged(root / "v000001-f3", offered)
        assert (found.way, found.why_file) == ("socket", "")
        assert_equal_to_folder(found.tensors, root / "v000001-f3")


@pytest.mark.parametrize(
    ("how", "timeout_s", "why"),
    [("dies", 60.0, "closed|broke"), ("stops", 1.0, "silent|not done within")],
)
def test_a_learner_killed_or_stopped_in_the_middle_costs_no_more_than_the_timeout(
    how: str, timeout_s: float, why: str, root: Path, manifest: WeightManifest
) -> None:
    with child("learner", root, "v000001-f3", timeout_s, how, "cpu") as learner:
        offered = load_manifest(said(learner))
        with pytest.raises(PeerError, match=why):
            pull(offered, CPU)
    with child("learner", root, "v000001-f3", timeout_s, how, "cpu") as learner:
        offered = load_manifest(said(learner))
        began_s = time.monotonic()
        found = staged(root / "v000001-f3", offered)
        assert time.monotonic() - began_s < 10.0  # a killed one is noticed at once
    assert found.way == "file"
    assert found.why_file
    assert_equal_to_folder(found.tensors, root / "v000001-f3")


def test_a_server_that_never_answers_costs_the_timeout(
    root: Path, manifest: WeightManifest
) -> None:
    with socket.create_server((peer.LOOPBACK, 0)) as silent:
        offered = offered_by(manifest, silent.getsockname()[1], 0.3)
        began_s = time.monotonic()
        found = staged(root / "v000001-f3", offered)
        assert 0.3 <= time.monotonic() - began_s < 5.0
    assert found.way == "file"
    assert "silent" in found.why_file or "not done within" in found.why_file


def test_nobody_listening_and_a_learner_elsewhere_mean_the_files(
    root: Path, manifest: WeightManifest
) -> None:
    with socket.create_server((peer.LOOPBACK, 0)) as server:
        port = server.getsockname()[1]
    gone = offered_by(manifest, port, DEADLINE_S)
    assert "does not answer" in staged(root / "v000001-f3", gone).why_file
    assert gone.peer is not None
    elsewhere = gone.model_copy(update={"peer": gone.peer.model_copy(update={"host_id": "x"})})
    assert "another host" in staged(root / "v000001-f3", elsewhere).why_file


async def test_other_bytes_than_the_manifest_says_are_refused(
    root: Path, manifest: WeightManifest, make_folder: FolderMaker, tmp_path: Path
) -> None:
    await publish(tmp_path / "other", make_folder("b", seed=2, extra_bytes=BULK_BYTES))
    with serving(tmp_path / "other") as server:
        offered = server.offer(manifest)
        with pytest.raises(PeerError, match="3 tensors came with other bytes"):
            pull(offered, CPU)
        found = staged(root / "v000001-f3", offered)
    assert found.way == "file"
    assert_equal_to_folder(found.tensors, root / "v000001-f3")


async def test_a_damaged_file_is_not_staged(root: Path, manifest: WeightManifest) -> None:
    path = root / "v000001-f3" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    transport = FileTransport(root)
    await transport.fetch(manifest, root, contents=False)
    await transport.close()
    stager = Stager()
    stager.begin(root / "v000001-f3", "auto", CPU, manifest)
    wait_for(lambda: stager.state != "reading")
    assert "1 tensors are not those of the manifest" in stager.state


async def test_only_the_newest_version_is_held_and_another_is_refused_clearly(
    root: Path, manifest: WeightManifest, make_folder: FolderMaker
) -> None:
    second = await publish(root, make_folder("b", seed=2), 2)
    with serving(root) as server:
        old = server.offer(manifest)
        new = server.offer(second)
        assert server.held_versions == [2]
        assert answer_to(old).refused == "version 1 (fence 3) is not held here"
        assert "not held" in answer_to(new, fence=4).refused
        assert "not held" in answer_to(new, run="other").refused
        found = staged(root / "v000001-f3", old)
        assert (found.way, "not held here" in found.why_file) == ("file", True)
        assert staged(root / "v000002-f3", new).way == "socket"


async def test_a_pull_under_way_goes_on_past_one_version_and_not_past_two(
    root: Path, manifest: WeightManifest, make_folder: FolderMaker
) -> None:
    versions = [await publish(root, make_folder(f"w{i}", seed=i), i) for i in (2, 3)]
    with serving(root) as server, child("worker") as worker:
        offered = server.offer(manifest)
        assert worker.stdin is not None
        worker.stdin.write(dump_manifest(offered) + "\n")
        worker.stdin.flush()
        said(worker)
        server.offer(versions[0])
        assert server.held_versions == [2, 1]
        newest = server.offer(versions[1])
        wait_for(lambda: server.held_versions == [3])
        assert pull(newest, CPU)[2] == "socket"


def test_a_wrong_secret_is_refused(root: Path, manifest: WeightManifest) -> None:
    with serving(root) as server:
        offered = server.offer(manifest)
        for secret in ("", "x", "é" * 64, "0" * 64):
            assert answer_to(offered, secret=secret).refused == "wrong secret"
        assert pull(offered, CPU)[2] == "socket"
        assert offered.peer is not None
        assert offered.peer.secret not in repr(offered)


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack(">I", 1 << 31),
        struct.pack(">I", 12) + b"\x80\x04not json!!",
        struct.pack(">I", 2) + b"{}",
        struct.pack(">I", 16) + b'{"protocol": 99}',
        b"\x00",
    ],
)
def test_a_garbage_header_is_refused_and_nobody_else_suffers(
    garbage: bytes, root: Path, manifest: WeightManifest
) -> None:
    with serving(root) as server:
        offered = server.offer(manifest)
        assert offered.peer is not None
        with socket.create_connection((peer.LOOPBACK, offered.peer.port), DEADLINE_S) as sock:
            sock.sendall(garbage)
            with suppress(OSError):  # ENOTCONN: the server has hung up already, which is right
                sock.shutdown(socket.SHUT_WR)
            with suppress(ConnectionResetError):
                assert sock.recv(1) == b""
        assert pull(offered, CPU)[2] == "socket"


def test_garbage_from_the_server_is_refused_too(root: Path, manifest: WeightManifest) -> None:
    def answer(listener: socket.socket) -> None:
        sock, _ = listener.accept()
        with sock:
            sock.recv(1 << 16)
            sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with socket.create_server((peer.LOOPBACK, 0)) as listener:
        thread = threading.Thread(target=answer, args=(listener,))
        thread.start()
        offered = offered_by(manifest, listener.getsockname()[1], DEADLINE_S)
        found = staged(root / "v000001-f3", offered)
        thread.join(DEADLINE_S)
    assert (found.way, "is no PullAnswer" in found.why_file) == ("file", True)


def test_two_workers_pull_at_once(root: Path, manifest: WeightManifest) -> None:
    with serving(root) as server, ThreadPoolExecutor(2) as pool:
        offered = server.offer(manifest)
        for tensors, _, way in pool.map(lambda _: pull(offered, CPU), range(2)):
            assert way == "socket"
            assert_equal_to_folder(tensors, root / "v000001-f3")


async def test_a_worker_killed_in_a_pull_harms_neither_learner_nor_the_next(
    root: Path, manifest: WeightManifest, make_folder: FolderMaker
) -> None:
    second = await publish(root, make_folder("b", seed=2), 2)
    with serving(root) as server:
        offered = server.offer(manifest)
        with child("worker") as worker:
            assert worker.stdin is not None
            worker.stdin.write(dump_manifest(offered) + "\n")
            worker.stdin.flush()
            said(worker)
            assert pull(offered, CPU)[2] == "socket"
            worker.kill()
        assert pull(offered, CPU)[2] == "socket"
        new = server.offer(second)
        wait_for(lambda: server.held_versions == [2])  # nothing of the dead one is kept
        assert pull(new, CPU)[2] == "socket"


def test_read_again_comes_from_the_files(root: Path, manifest: WeightManifest) -> None:
    stager = Stager()
    with serving(root) as server:
        stager.begin(root / "v000001-f3", "auto", CPU, server.offer(manifest))
        wait_for(lambda: stager.state == "ready")
    stager.let_go()
    stager.again()
    wait_for(lambda: stager.state == "ready")
    assert stager.staged is not None
    assert (stager.staged.way, stager.staged.why_file) == ("file", "")


def test_chunks_keep_the_order_and_leave_out_nothing_but_empty_tensors(
    manifest: WeightManifest,
) -> None:
    one = manifest.tensors[0]
    sizes = [1, 0, 300 << 20, 5, *([7] * 130)]
    tensors = [
        one.model_copy(update={"name": str(i), "dtype": "U8", "shape": (size,)})
        for i, size in enumerate(sizes)
    ]
    chunks = list(peer.chunks(tensors))
    assert [t for chunk in chunks for t in chunk] == [t for t in tensors if t.shape != (0,)]
    assert [len(chunk) for chunk in chunks] == [1, 1, 64, 64, 3]
    with pytest.raises(PeerError, match="width"):
        peer.tensor_bytes(one.model_copy(update={"dtype": "F3"}))


def test_without_nccl_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    nccl._library.cache_clear()
    if nccl.version():
        assert len(bytes.fromhex(nccl.new_id())) == 128
    else:
        with pytest.raises(OSError, match="nccl"):
            nccl.new_id()
