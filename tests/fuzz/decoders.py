"""Every decoder of something from outside: what it reads, a valid example, how it may end.

``decode`` takes bytes and an empty folder. It returns when they are valid, and raises one of
``errors`` when they are not; anything else is a bug.
"""

from __future__ import annotations

import json
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgpack
import numpy as np
import tomli_w

from learner.algorithms.selection import Selected
from learner.checkpoint import read_meta
from learner.journal import JournalReader
from learner.journal_files import encode_frame, file_name
from learner.record import BatchRecord, CarriedRollout, decode_rollout, pack_carry, pack_record
from learner.record import unpack_carry as decode_carry
from ringasync import SCHEMA_VERSION
from ringasync.broker.types import RawGroup, RawRollout
from ringasync.config.load import config_from_json, load_config, resolved_json
from ringasync.config.schema import TaskConfig
from ringasync.coordinator.feeder import Cursor
from ringasync.errors import (
    BadPromptError,
    CheckpointError,
    ConfigError,
    JournalError,
    ManifestError,
    PeerError,
    RingError,
    SchemaError,
)
from ringasync.records.prompt import read_prompt_ids, read_task
from ringasync.records.segment import Segment, decode_segment, encode_segment, policy_segment
from ringasync.records.weights import ProbeSequence, ShardInfo, TensorInfo, WeightManifest
from ringasync.tasks.rows import RowSource
from ringasync.weights.exports import ORIGIN_FILE, read_origin
from ringasync.weights.manifest import dump_manifest, load_manifest, tensor_infos, verify_folder
from ringasync.weights.peer import Connection, PullRequest

Form = Literal["bytes", "msgpack", "json", "toml", "text"]
DEMO = Path(__file__).parents[2] / "configs" / "demo.toml"
RUN = "run"


@dataclass(frozen=True)
class Decoder:
    """One decoder. ``form`` says which structure a mutation may change."""

    form: Form
    seeds: tuple[bytes, ...]
    decode: Callable[[bytes, Path], object]
    errors: tuple[type[RingError], ...]


def _segments() -> list[bytes]:
    rows = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    first = policy_segment(0, 1, [5, 6, 7], [-0.5, -0.25, -1.0], rows)
    plain = policy_segment(3, 2, [70_000, 2], [-0.5, -0.25])
    environment = Segment("environment", 5, 2, np.asarray([8], np.int32), np.zeros(0, np.float32))
    return [encode_segment(one) for one in (first, plain, environment)]


SEGMENTS = _segments()


def _rollout(rollout_id: str) -> RawRollout:
    return RawRollout(rollout_id, 0.25, "stop", 1, tuple(SEGMENTS))


def _record() -> BatchRecord:
    group = RawGroup("g1", "toy", (1, 2, 3), 4, (_rollout("g1.0"), _rollout("g1.1")))
    carried = CarriedRollout("c", "toy", (9,), 77, _rollout("c.1"), -0.1)
    return BatchRecord(
        batch_id="b1",
        step=1,
        fence=1,
        incarnation=1,
        round_id=0,
        policy_version=2,
        budget_tokens=6,
        seed=5,
        groups=(group,),
        advantages={"g1.0": 0.1, "g1.1": -1 / 3},
        carried=(carried,),
        order=(Selected("c.1", "c", 4), Selected("g1.0", "g1", 2, 2)),
        surplus=("g1.1",),
        ages={1: 1, 2: 0},
    )


def _decode_rollout(data: bytes, _: Path) -> object:
    """The way of a rollout's list of segments; the list itself is Redis's."""
    try:
        segments = msgpack.unpackb(data)
    except ValueError:
        raise SchemaError("the test's own wrapping is broken") from None
    if not isinstance(segments, list) or not all(isinstance(one, bytes) for one in segments):
        raise SchemaError("the test's own wrapping is broken")
    return decode_rollout("g1", "toy", (1, 2), RawRollout("g1.0", 0.0, "stop", 0, tuple(segments)))


_MARKER = {"kind": "marker", "schema": SCHEMA_VERSION, "run": RUN, "fence": 1}


def _journal_bytes(*payloads: bytes) -> bytes:
    frames = [bytes(msgpack.packb(_MARKER)), *payloads]
    return b"".join(encode_frame(one) for one in frames)


_RECORD = bytes(msgpack.packb({"kind": "batch", **pack_record(_record())}))


def _read_journal(data: bytes, folder: Path) -> object:
    """Look, read everything and make each batch, as a learner that resumes does."""
    (folder / file_name(1, 0)).write_bytes(data)
    reader = JournalReader.look(folder, RUN)
    batches = []
    for _, record in reader.read():
        batches.append((record.train_batch(), record.trained_tokens(), record.carry()))
    return batches


def _read_manifest(data: bytes, folder: Path) -> object:
    manifest = load_manifest(data)
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_bytes(b"")
    try:
        verify_folder(manifest, folder)
    except ManifestError as error:
        if data in MANIFESTS and "shard" in str(error):
            return manifest  # the files of the valid example are not here
        raise
    return manifest


def _manifest() -> bytes:
    manifest = WeightManifest(
        run=RUN,
        policy_version=3,
        learner_step=2,
        fork_step=0,
        fence=1,
        transport="file",
        location="v000003-f1",
        shards=(ShardInfo(name="model.safetensors", size_bytes=10, xxh3_128="0" * 32),),
        tensors=(TensorInfo(name="w", shape=(2, 2), dtype="F32", digest="0" * 32),),
        probe=(ProbeSequence(prompt_ids=(1,), token_ids=(2,), logprobs=(-0.5,)),),
    )
    return dump_manifest(manifest).encode()


MANIFESTS = (_manifest(),)


def _safetensors(header: object) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * 16


def _read_safetensors(data: bytes, folder: Path) -> object:
    """``data`` is the header's JSON; the length before it is right and 16 bytes follow."""
    path = folder / "model.safetensors"
    path.write_bytes(len(data).to_bytes(8, "little") + data + b"\0" * 16)
    return tensor_infos(path)


def _read_whole_safetensors(data: bytes, folder: Path) -> object:
    path = folder / "model.safetensors"
    path.write_bytes(data)
    return tensor_infos(path)


_HEADER = {
    "__metadata__": {"format": "pt"},
    "w": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
    "b": {"dtype": "I64", "shape": [], "data_offsets": [8, 16]},
}


def _load_config(data: bytes, folder: Path) -> object:
    path = folder / "run.toml"
    path.write_bytes(data)
    return load_config(path)


def _override(data: bytes, _: Path) -> object:
    return load_config(DEMO, [data.decode("utf-8", "replace")])


def _stored_config(data: bytes, _: Path) -> object:
    return config_from_json(data.decode("utf-8", "replace"))


def _meta(data: bytes, folder: Path) -> object:
    (folder / "meta.json").write_bytes(data)
    return read_meta(folder)


def _cursor(data: bytes, _: Path) -> object:
    return Cursor.from_json(data.decode("utf-8", "replace"))


def _origin(data: bytes, folder: Path) -> object:
    (folder / ORIGIN_FILE).write_bytes(data)
    return read_origin(folder)


_TASK = TaskConfig(
    name="rows", kind="jsonl", dataset="rows.jsonl", verifier="exact", prompt_field="q"
)


def _row(data: bytes, _: Path) -> object:
    """One line of a JSONL file, as the loader gives it: bytes as latin-1, no line ends."""
    text = data.decode("latin-1").replace("\n", " ").replace("\r", " ")
    return RowSource(_TASK, [{"text": text}]).problem(0)


def _message(data: bytes, _: Path) -> object:
    """What a stranger sends to the learner's weight server, over a real socket."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(len(data).to_bytes(4, "big") + data)
        theirs.shutdown(socket.SHUT_WR)
        # TCP_NODELAY does not fit a unix socket, everything else is the same.
        connection = Connection.__new__(Connection)
        connection._sock, connection._timeout_s = ours, 5.0
        connection._deadline_s = time.monotonic() + 5.0
        return connection.receive(PullRequest)


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


_CONFIG = load_config(DEMO)
_CURSOR = {"next": 9, "life": 1, "closed": {"low": 3, "runs": [[5, 6]]}, "ended": False}
_META = {
    **{"schema": SCHEMA_VERSION, "run": RUN, "step": 3, "fence": 1, "life": 1},
    **{"journal_offset": 99, "policy_version": 2, "last_round_id": 0, "published_step": 3},
    **{"data_position": json.dumps(_CURSOR["closed"]), "carry_xxh3": "0" * 16},
}
_REQUEST = PullRequest(run=RUN, policy_version=3, fence=1, secret="s" * 32)
_TOML: dict[str, Any] = {
    "run": {"name": "fuzz", "seed": 3},
    "model": {"path": "starter"},
    "data": {"tasks": [{"name": "t", "kind": "reasoning_gym", "dataset": "chain_sum"}]},
    "schedule": {"group_size": 4, "budget": {"tokens": 1024}},
    "loss": {"mismatch": "icepop"},
    "worker": {"engine_options": {"any": [1, 2]}},
}

DECODERS: dict[str, Decoder] = {
    "segment": Decoder("msgpack", tuple(SEGMENTS), lambda b, _: decode_segment(b), (SchemaError,)),
    "rollout": Decoder(
        "msgpack", (bytes(msgpack.packb(SEGMENTS)),), _decode_rollout, (SchemaError,)
    ),
    "record": Decoder(
        "msgpack",
        (_RECORD,),
        lambda b, folder: _read_journal(_journal_bytes(b), folder),
        (JournalError, SchemaError),
    ),
    "journal": Decoder(
        "bytes", (_journal_bytes(_RECORD, _RECORD),), _read_journal, (JournalError, SchemaError)
    ),
    "carry": Decoder(
        "msgpack",
        (pack_carry(_record().carry()),),
        lambda b, _: [one.trajectory() for one in decode_carry(b)],
        (JournalError, SchemaError),
    ),
    "checkpoint_meta": Decoder("json", (_json(_META),), _meta, (CheckpointError,)),
    "cursor": Decoder("json", (_json(_CURSOR),), _cursor, (CheckpointError,)),
    "manifest": Decoder("json", MANIFESTS, _read_manifest, (ManifestError,)),
    "safetensors_header": Decoder("json", (_json(_HEADER),), _read_safetensors, (ManifestError,)),
    "safetensors": Decoder(
        "bytes", (_safetensors(_HEADER),), _read_whole_safetensors, (ManifestError,)
    ),
    "export_origin": Decoder(
        "json",
        (_json({"run": RUN, "policy_version": 3, "learner_step": 2}),),
        _origin,
        (ManifestError,),
    ),
    "peer_request": Decoder("json", (_REQUEST.model_dump_json().encode(),), _message, (PeerError,)),
    "config": Decoder(
        "toml", (tomli_w.dumps(_TOML).encode(), DEMO.read_bytes()), _load_config, (ConfigError,)
    ),
    "override": Decoder(
        "text",
        (b"loss.mismatch=tis", b"data.tasks.0.weight=2", b"schedule.budget.tokens = 4096"),
        _override,
        (ConfigError,),
    ),
    "stored_config": Decoder(
        "json", (resolved_json(_CONFIG).encode(),), _stored_config, (ConfigError,)
    ),
    "prompt_ids": Decoder(
        "json", (b"[1, 2, 151935]",), lambda b, _: read_prompt_ids(b), (SchemaError,)
    ),
    "task": Decoder(
        "json",
        (_json({"verifier": "exact", "answer": "2", "meta": {"k": [1, None]}}),),
        lambda b, _: read_task(b),
        (SchemaError,),
    ),
    "prompt_row": Decoder("json", (_json({"q": "1+1=", "answer": "2"}),), _row, (BadPromptError,)),
}


def verdict(name: str, data: bytes) -> BaseException | None:
    """The documented error that ``data`` ends in; None where it is valid."""
    decoder = DECODERS[name]
    with tempfile.TemporaryDirectory() as folder:
        try:
            decoder.decode(data, Path(folder))
        except decoder.errors as error:
            return error
    return None
