"""The parts of the chaos suite: the schedule, the proxy, the small disks."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from .deliver import Under
from .faults import DECK, DECK_SIZE, SESSION_TTL_S, schedule
from .leg import Tally
from .proxy import Proxy
from .report import Report, spread
from .stage import Stage


def test_the_same_seed_draws_the_same_faults() -> None:
    first, again, other = (list(islice(schedule(seed), 200)) for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_every_deck_has_every_kind() -> None:
    faults = list(islice(schedule(3), 2 * DECK_SIZE))
    counts = Counter((fault.kind, fault.target) for fault in faults)
    assert counts == {(kind.kind, kind.target): 2 * kind.count for kind in DECK}
    past = [fault.lasts_s for fault in faults if fault.kind == "zombie"]
    assert min(past) > SESSION_TTL_S


@pytest.fixture
def echo() -> Iterator[int]:
    """A server that sends back what it gets."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer(connection: socket.socket) -> None:
            with connection:
                while data := connection.recv(1024):
                    connection.sendall(data)

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)


@pytest.fixture
def proxy(echo: int) -> Iterator[Proxy]:
    """Two ways to it."""
    proxy = Proxy(["a", "b"], lambda: echo)
    yield proxy
    proxy.close()


def call(connection: socket.socket, data: bytes = b"hello") -> bytes:
    connection.sendall(data)
    return connection.recv(1024)


def is_severed(connection: socket.socket) -> bool:
    """Whether the other side is gone: a reset, or an end of file."""
    try:
        return call(connection) == b""
    except ConnectionError:
        return True


def test_bytes_go_through_and_come_back(proxy: Proxy) -> None:
    with socket.create_connection(("127.0.0.1", proxy.ports["a"]), timeout=5) as connection:
        assert call(connection) == b"hello"
        assert call(connection, b"again") == b"again"


def test_a_cut_severs_one_role_and_lets_it_come_back(proxy: Proxy) -> None:
    with (
        socket.create_connection(("127.0.0.1", proxy.ports["a"]), timeout=5) as mine,
        socket.create_connection(("127.0.0.1", proxy.ports["b"]), timeout=5) as other,
    ):
        assert call(mine) == call(other) == b"hello"
        assert proxy.cut("a") == 1
        assert is_severed(mine)
        assert call(other) == b"hello"
    with socket.create_connection(("127.0.0.1", proxy.ports["a"]), timeout=5) as again:
        assert call(again) == b"hello"
        assert proxy.cut("a") == 1
    assert proxy.cut("b") in (0, 1)  # closed by its client a moment ago


def test_what_is_held_arrives_after_the_release(proxy: Proxy) -> None:
    with socket.create_connection(("127.0.0.1", proxy.ports["a"]), timeout=0.3) as connection:
        assert call(connection) == b"hello"
        proxy.hold("a", True)
        with pytest.raises(TimeoutError):
            call(connection)
        assert proxy.links["a"].held_chunks == 1
        proxy.hold("a", False)
        connection.settimeout(5)
        assert connection.recv(1024) == b"hello"


def test_a_delay_is_felt_and_counted(proxy: Proxy) -> None:
    with socket.create_connection(("127.0.0.1", proxy.ports["a"]), timeout=5) as connection:
        proxy.links["a"].delay_s = 0.1
        began_s = time.monotonic()
        assert call(connection) == b"hello"
        assert time.monotonic() - began_s >= 0.2  # there and back
        assert proxy.links["a"].delayed_chunks == 2


def test_a_disk_is_full_to_its_last_byte_and_free_again(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "stage", tmp_path, 0, 1)
    try:
        if "disk" in stage.skipped:
            pytest.skip(stage.skipped["disk"])
        for disk in stage.disks:
            assert stage.fill(disk)
            with pytest.raises(OSError, match="No space left"):
                (stage.disks[disk] / "more").write_bytes(b"x" * 8192)
            stage.free(disk)
            (stage.disks[disk] / "more").write_bytes(b"x" * 8192)
    finally:
        stage.close()


def test_spread_of_nothing_is_none() -> None:
    assert spread([])["p99"] is None
    assert spread([1.0, 3.0]) == {"n": 2, "p50": 2.0, "p99": 2.98, "max": 3.0}


def test_kinds_that_were_never_felt_are_named_but_for_those_that_cannot_be_had() -> None:
    deck = islice(schedule(3), DECK_SIZE)
    felt = [Under(fault, "worker-1", 0.0, lambda _: True) for fault in deck if fault.kind != "cut"]
    assert Report([Tally(3, felt)]).never_felt() == ["cut"]
    assert Report([Tally(3, felt, skipped=Counter(["cut"]))]).never_felt() == []
