"""Writes ``tests/fuzz/corpus``: bad inputs of every decoder, as different as can be found.

    python -m tests.fuzz.make_corpus

One file a decoder, one input a line: the error it must end in, and its bytes (zlib, base64). The
same code gives the same files. ``BREAKERS`` come first: what had got past a decoder before.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import msgpack

from tests.fuzz.decoders import DECODERS, SEGMENTS, verdict
from tests.fuzz.mutate import mutated

CORPUS = Path(__file__).with_name("corpus")
KEPT = 40
MOST_ALIKE = 6
"""Inputs that are kept of those with the same message but for its values."""
MOST_TRIES = 4000
MOST_LINE_BYTES = 2000


def _segment(**changes: object) -> bytes:
    return bytes(msgpack.packb(msgpack.unpackb(SEGMENTS[1]) | changes))


def _header(**entry: object) -> bytes:
    whole = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | entry
    return json.dumps({str(whole.pop("name", "w")): whole}).encode()


BREAKERS: dict[str, tuple[bytes, ...]] = {
    "rollout": (
        bytes(msgpack.packb([SEGMENTS[0], _segment(v=2**40)])),
        bytes(msgpack.packb([_segment(s=0, v=2**31)])),
    ),
    "carry": (bytes(msgpack.packb({"schema": 1, "carry": [[None] * 6]})),),
    "record": (
        bytes(msgpack.packb({"kind": "batch", "schema": 1})),
        bytes(msgpack.packb({"kind": "batch", "schema": 1, "batch_id": "b", "step": []})),
    ),
    "checkpoint_meta": (b"[" * 100_000, b'{"schema": 1, "step": 1e999}'),
    "cursor": (
        b"[" * 100_000,
        b'{"next":1,"life":1,"closed":{"low":0,"runs":[[2,999999999999]]},"ended":false}',
        b'{"next":1e999,"life":1,"closed":{"low":0,"runs":[]},"ended":false}',
    ),
    "safetensors_header": (
        b"[" * 100_000,
        _header(shape=[float("inf")]),
        _header(name="\ud800"),
        _header(data_offsets=[0, float("inf")]),
    ),
    "prompt_ids": (b"[" * 100_000, b"[1, true]", b"[1, 2147483648]", b"[" + b"9" * 5000 + b"]"),
    "task": (b"[" * 100_000, b'"text"'),
    "config": (b"[run]\nseed = " + b"9" * 5000,),
    "override": (b"run.seed=" + b"9" * 5000,),
    "export_origin": (b"[" * 100_000, b'{"run":"r","policy_version":1e999,"learner_step":1}'),
}


def read_corpus(name: str) -> Iterator[tuple[str, bytes]]:
    """(name of the error, input) of one decoder's file."""
    for line in (CORPUS / f"{name}.txt").read_text(encoding="ascii").splitlines():
        error, text = line.split()
        yield error, zlib.decompress(base64.b64decode(text))


def _line(error: BaseException, data: bytes) -> str:
    return f"{type(error).__name__} {base64.b64encode(zlib.compress(data, 9)).decode()}"


def _template(error: BaseException) -> str:
    return re.sub(r"'[^']*'|\"[^\"]*\"|/\S+|[-+.\d]+|[^\x20-\x7e]+", "*", str(error))[:120]


def lines(name: str) -> list[str]:
    """One decoder's file."""
    decoder, random = DECODERS[name], Random(name)
    kept: dict[bytes, str] = {}
    alike: Counter[str] = Counter()
    for data in BREAKERS.get(name, ()):
        error = verdict(name, data)
        if error is None:
            raise SystemExit(f"{name} takes {data[:60]!r}")
        kept[data] = _line(error, data)
    for _ in range(MOST_TRIES):
        if len(kept) >= KEPT:
            break
        data = mutated(decoder.form, random.choice(decoder.seeds), random)
        error = verdict(name, data) if data not in kept else None
        if error is None or alike[_template(error)] >= MOST_ALIKE:
            continue
        line = _line(error, data)
        if len(line) <= MOST_LINE_BYTES:
            alike[_template(error)] += 1
            kept[data] = line
    return list(kept.values())


def main() -> None:
    """Write every file and say how many inputs there are."""
    CORPUS.mkdir(exist_ok=True)
    total = 0
    for name in DECODERS:
        found = lines(name)
        total += len(found)
        (CORPUS / f"{name}.txt").write_text("\n".join(found) + "\n", encoding="ascii")
        print(f"{name}: {len(found)}")
    print(f"{total} inputs")


if __name__ == "__main__":
    main()
