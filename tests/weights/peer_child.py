"""A learner or a worker of its own process for ``test_peer``: ``peer_child.py ROLE ROOT ...``."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

from learner import peer_server
from learner.peer_server import PeerServer, _Held
from ringasync.weights import peer
from ringasync.weights.manifest import MANIFEST_FILE, dump_manifest, load_manifest

_HALT = {"dies": signal.SIGKILL, "stops": signal.SIGSTOP}


class _HaltingServer(PeerServer):
    """Sends part of the first tensor, then dies or stands still."""

    halt: signal.Signals

    def _send(
        self,
        connection: peer.Connection,
        held: _Held,
        request: peer.PullRequest,
        group: contextlib.ExitStack,
    ) -> str:
        total_bytes = sum(map(peer.tensor_bytes, held.manifest.tensors))
        connection.send(peer.PullAnswer(total_bytes=total_bytes))
        connection.send_bytes(memoryview(bytes(100)))
        os.kill(os.getpid(), self.halt)
        return "socket"


def serve(root: Path, version: str, timeout_s: float, how: str, device: str) -> None:
    """Print the manifest with the offer, then serve until stdin ends."""
    manifest = load_manifest((root / version / MANIFEST_FILE).read_bytes())
    kind = PeerServer
    if how in _HALT and device == "cpu":
        kind, _HaltingServer.halt = _HaltingServer, _HALT[how]
    elif how in _HALT:  # the NCCL group stands, and then nothing comes
        peer_server._send_by_nccl = lambda *_: os.kill(os.getpid(), _HALT[how])
    server = kind(root, device, timeout_s=timeout_s)
    print(dump_manifest(server.offer(manifest)), flush=True)
    sys.stdin.read()


def begin_pull() -> None:
    """Ask for the version whose manifest stands on stdin, take a few bytes, wait to be killed."""
    manifest = load_manifest(sys.stdin.readline())
    assert manifest.peer is not None
    connection = peer.Connection.to(manifest.peer.port, manifest.peer.timeout_s)
    connection.send(
        peer.PullRequest(
            run=manifest.run,
            policy_version=manifest.policy_version,
            fence=manifest.fence,
            secret=manifest.peer.secret,
        )
    )
    connection.receive(peer.PullAnswer)
    connection.receive_into(memoryview(bytearray(64)))
    print("pulling", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    if sys.argv[1] == "learner":
        serve(Path(sys.argv[2]), sys.argv[3], float(sys.argv[4]), *sys.argv[5:])
    else:
        begin_pull()
