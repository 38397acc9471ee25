"""Changes that turn something valid into something that may not be: of bytes and of structure."""

from __future__ import annotations

import contextlib
import copy
import json
import tomllib
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import msgpack
import tomli_w

from tests.fuzz.decoders import Form

NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**15, 2**31, 2**32, 2**63 - 1, -(2**63), 2**64 - 1),
    *(0.5, -0.0, 1e308, float("inf"), float("-inf"), float("nan")),
    *("", "x", "0", "-1", "1e999", "../../etc/passwd", "/", ".", "a\0b", "\ud800", "é" * 300),
    *(b"", b"\0", b"\xff" * 7, [], {}, [[]], {"": None}, [0] * 40, {"schema": 1}, {"0": 0}),
)
"""Values of the wrong type, size or sign. What a form cannot say is left out by its encoder."""

Path = tuple[str | int, ...]


def mutated(form: Form, seed: bytes, random: Random) -> bytes:
    """One to three changes of ``seed``."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        seed = _once(form, seed, random)
    return seed


def _once(form: Form, data: bytes, random: Random) -> bytes:
    codec = _CODECS.get(form)
    if codec is not None and random.random() < 0.75:
        decode, encode = codec
        # A former change may have broken the form, or made a value that it cannot say.
        with contextlib.suppress(Exception):
            return encode(_changed(decode(data), random), random)
    if form in ("toml", "text", "json") and random.random() < 0.4:
        return _changed_text(data, random)
    return _changed_bytes(data, random)


def _changed_bytes(data: bytes, random: Random) -> bytes:
    at = random.randint(0, len(data))
    end = min(len(data), at + random.randint(1, 12))
    return random.choice(
        (
            data[:at],
            data[at:],
            data[:at] + data[end:],
            data[:at] + data[at:end] * 2 + data[end:],
            data[:at] + random.randbytes(random.randint(1, 8)) + data[end:],
            data[:at] + b"\0" * (end - at) + data[end:],
            data[:at] + b"\xff" * (end - at) + data[end:],
            data[: at - 1] + bytes([data[at - 1] ^ 1 << random.randint(0, 7)]) + data[at:]
            if at
            else data,
            data + data,
        )
    )


_WORDS = (
    *("9" * 5000, "[" * 2000, "{" * 300, "nan", "-inf", "1e999", "0x", "1979-05-27T07:32:00Z"),
    *('"""', "'", '"', "\\ud800", "\\u0000", "\0", "\ufeff", "=", ".", ",", "]", "}", "null"),
    *("[[data.tasks]]", "[loss]", "true", "-1", "99999999999999999999", "''", "a.b.c = 1", "#"),
)


def _changed_text(data: bytes, random: Random) -> bytes:
    text = data.decode("utf-8", "replace")
    at = random.randint(0, len(text))
    end = min(len(text), at + random.randint(0, 12))
    return (text[:at] + random.choice(_WORDS) + text[end:]).encode("utf-8", "surrogatepass")


def _places(value: Any, path: Path = ()) -> Iterator[Path]:
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from _places(value[key], (*path, key))
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from _places(each, (*path, index))


def _changed(value: Any, random: Random) -> Any:
    value = copy.deepcopy(value)
    *parents, leaf = random.choice([p for p in _places(value) if p] or [("",)])
    parent = value
    for part in parents:
        parent = parent[part]
    what = random.random()
    old = parent[leaf]
    if what < 0.15:
        del parent[leaf]
    elif what < 0.25 and isinstance(parent, dict):
        parent[random.choice(("zz", "", "schema", "0"))] = random.choice(NASTY)
    elif what < 0.3 and isinstance(parent, list):
        parent.append(copy.deepcopy(random.choice(parent)))
    elif what < 0.5 and isinstance(old, bytes):
        parent[leaf] = _changed_bytes(old, random)
    elif what < 0.5 and isinstance(old, int) and not isinstance(old, bool):
        parent[leaf] = old + random.choice((-1, 1, 2, 1 << 16, 1 << 40))
    elif what < 0.55:
        parent[leaf] = _nested(random.choice((3, 40, 400)))
    else:
        parent[leaf] = copy.deepcopy(random.choice(NASTY))
    return value


def _nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def _unpack(data: bytes) -> Any:
    return msgpack.unpackb(data, strict_map_key=False)


def _pack(value: Any, _: Random) -> bytes:
    return bytes(msgpack.packb(value, unicode_errors="surrogatepass"))


def _dump_json(value: Any, _: Random) -> bytes:
    return json.dumps(value, default=lambda odd: odd.decode("latin-1")).encode()


def _dump_toml(value: Any, _: Random) -> bytes:
    return tomli_w.dumps(value).encode("utf-8", "surrogatepass")


_CODECS: dict[Form, tuple[Callable[[bytes], Any], Callable[[Any, Random], bytes]]] = {
    "msgpack": (_unpack, _pack),
    "json": (json.loads, _dump_json),
    "toml": (lambda data: tomllib.loads(data.decode()), _dump_toml),
}
