"""The nodes of a learner that spans several: which one this is, and what their launchers tell each
other.

Which one, it learns from torchrun's own variables, so that whatever starts torchrun can start it:

::

    PET_NNODES         how many nodes
    PET_NODE_RANK      which of them this is, from 0; node 0 has rank 0, which talks to Redis
    PET_RDZV_ENDPOINT  HOST:PORT of node 0, port 29400 unless given

Torchrun's agents wait for each other at the start and at a good end. In between an agent watches
the ranks of its own node alone, and a rank that waits for one of another node may wait for ever.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from ringasync.errors import MALFORMED_JSON, ConfigError

START_TIMEOUT_S = 1800
"""How long a node waits for the others at the start: they may still be pulling their images."""
SILENT_S = 20.0
"""A node whose launcher says nothing for so long is gone: its machine, or the way to it."""

ENDING_S = 30.0
"""How long a node whose ranks are gone waits for another, whose launcher speaks, to end its own."""

_BEAT_S = 0.2
_CLOSE_S = 2.0
_DEFAULT_PORT = 29400


@dataclass(frozen=True, slots=True)
class Nodes:
    """This process's place among the nodes of one learner; ``host`` and ``port`` are node 0's."""

    count: int = 1
    this: int = 0
    host: str = ""
    port: int = 0

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Nodes:
        """The place that torchrun's variables give; one node without ``PET_NNODES``.

        Raises ``ConfigError`` that names the variable.
        """
        count = _number(environment, "PET_NNODES", "1", range(1, 1 << 16))
        if count == 1:
            return cls()
        this = _number(environment, "PET_NODE_RANK", "", range(count))
        endpoint = environment.get("PET_RDZV_ENDPOINT", "")
        try:
            host, port = parse_rendezvous_endpoint(endpoint, _DEFAULT_PORT)
        except ValueError as error:
            raise ConfigError(f"PET_RDZV_ENDPOINT: {error}") from error
        if not endpoint or not port:
            raise ConfigError(
                f"PET_NNODES = {count}, but PET_RDZV_ENDPOINT = {endpoint!r}: set it to HOST:PORT "
                "of the node with PET_NODE_RANK = 0, the same on all nodes"
            )
        return cls(count, this, host, port)

    def ranks_here(self, ranks: int) -> int:
        """This node's share of ``learner.ranks``.

        Raises ``ConfigError``: they cannot be dealt out evenly.
        """
        if ranks % self.count:
            raise ConfigError(
                f"learner.ranks = {ranks} cannot be dealt out evenly to {self.count} nodes "
                "(PET_NNODES): it counts the ranks of all nodes together"
            )
        return ranks // self.count

    @property
    def endpoint(self) -> str:
        """Node 0's address as torchrun takes it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _number(environment: Mapping[str, str], name: str, default: str, allowed: range) -> int:
    text = environment.get(name, default)
    if not text.isascii() or not text.isdigit() or int(text) not in allowed:
        raise ConfigError(
            f"{name} = {text!r} must be a number from {allowed[0]} to {allowed[-1]}: nodes do not "
            "come and go within a learner's life"
        )
    return int(text)


@dataclass(frozen=True, slots=True)
class Ending:
    """How a node's part of the job ended: exit codes of its ranks, which were gone at the first
    look, what they left for the launcher to say, and their process numbers there."""

    exit_codes: dict[int, int] = field(default_factory=dict)
    gone: list[int] = field(default_factory=list)
    said: dict[int, str] = field(default_factory=dict)
    pids: dict[int, int] = field(default_factory=dict)

    def to_json(self) -> str:
        """As it goes over the store."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Ending:
        """Raises one of ``MALFORMED_JSON``."""
        found = json.loads(text)
        codes, pids = (
            {int(rank): int(number) for rank, number in found[name].items()}
            for name in ("exit_codes", "pids")
        )
        said = {int(rank): str(text) for rank, text in found["said"].items()}
        return cls(codes, [int(rank) for rank in found["gone"]], said, pids)


class NodeWatch:
    """A launcher's talk with those of the other nodes, over node 0's store.

    Consumes: the others' beats, endings and requests to stop; produces: this node's. Waits for the
    store, in a thread of its own; a store that does not answer is itself the news.
    """

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self._others = [one for one in range(nodes.count) if one != nodes.this]
        self.stop_asked = threading.Event()
        """Another node was asked to stop: node 0 acts on it."""
        self.endings: dict[int, Ending] = {}
        """Of the other nodes, by number."""
        self._own: Ending | None = None
        self._stop = False
        self._beats: dict[int, tuple[int, float]] = {}
        self._answered_s = 0.0
        self._all_told = threading.Event()
        self._broken = threading.Event()
        self._closed = threading.Event()
        # A daemon: it waits for node 0, which may never come.
        self._thread = threading.Thread(target=self._run, name="nodes", daemon=True)
        self._thread.start()

    def silent(self) -> list[int]:
        """Nodes that were there, told no ending and say nothing any more."""
        now_s = time.monotonic()
        late = [
            node
            for node, (_, heard_s) in list(self._beats.items())
            if now_s - heard_s > SILENT_S and node not in self.endings
        ]
        store_is_gone = self._broken.is_set() or (
            self._answered_s and now_s - self._answered_s > SILENT_S
        )
        if self._nodes.this and store_is_gone and 0 not in self.endings:
            return [0]
        return late

    def has_lost_some(self) -> bool:
        """Whether a node is gone, so that the job cannot go on."""
        return bool(self.endings) or bool(self.silent())

    def ask_stop(self) -> None:
        """Have node 0 finish its step and its checkpoint, then all leave."""
        self._stop = True

    def exchange(self, own: Ending, timeout_s: float) -> list[int]:
        """Tell how this node ended, and wait until all others have, and know of each other; returns
        those that told nothing within ``timeout_s``. One that fell silent is not waited for."""
        self._own = own
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s and not self._broken.is_set():
            if self._all_told.wait(_BEAT_S / 2) or self.silent():
                break
        return [node for node in self._others if node not in self.endings]

    def close(self) -> bool:
        """End the talk; whether its thread has ended. It has not where node 0 never came."""
        self._closed.set()
        self._thread.join(_CLOSE_S)
        return not self._thread.is_alive()

    def _run(self) -> None:
        timeout = timedelta(seconds=START_TIMEOUT_S)
        try:
            store = PrefixStore(
                "launchers",
                TCPStore(
                    self._nodes.host,
                    self._nodes.port,
                    # The agent's store ends with its job. This one shares its server, and has
                    # to be there when the endings are told.
                    is_master=self._nodes.this == 0,
                    multi_tenant=True,
                    wait_for_workers=False,
                    timeout=timeout,
                ),
            )
            while not self._closed.wait(_BEAT_S):
                self._look(store)
        except (RuntimeError, *MALFORMED_JSON):  # torch's errors of stores are RuntimeErrors
            self._broken.set()

    def _look(self, store: PrefixStore) -> None:
        this = self._nodes.this
        store.add(f"beat/{this}", 1)
        if self._own is not None:
            store.set(f"ending/{this}", self._own.to_json())
        if self._stop:
            store.set("stop", "asked")
        if store.check(["stop"]):
            self.stop_asked.set()
        for node in self._others:
            beats = store.add(f"beat/{node}", 0)
            if beats and beats != self._beats.get(node, (0, 0.0))[0]:
                self._beats[node] = beats, time.monotonic()
            if node not in self.endings and store.check([f"ending/{node}"]):
                self.endings[node] = Ending.from_json(store.get(f"ending/{node}").decode())
        if self._own is not None and len(self.endings) == len(self._others):
            store.set(f"told/{this}", "all")
            # Node 0 keeps the store, so it stays until all others have read all.
            if this or store.check([f"told/{node}" for node in self._others]):
                self._all_told.set()
        self._answered_s = time.monotonic()
