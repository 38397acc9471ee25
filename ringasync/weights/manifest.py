"""Build, store and check the manifest of one published policy version.

A version is an HF-format folder: ``config.json``, one or more ``*.safetensors`` files and the
tokenizer's files. Every one of them is a *shard* of the manifest (name, size, checksum), so that
what a worker reads is what the learner wrote. Each tensor has a digest of its own, for read-back.
No torch here: the safetensors layout (8-byte little-endian header length, JSON header, raw
little-endian tensor bytes) is read directly, and the bytes are never interpreted.
"""

from __future__ import annotations

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import xxhash
from pydantic import ValidationError

from ringasync.errors import MALFORMED, ManifestError
from ringasync.records.weights import ProbeSequence, ShardInfo, TensorInfo, WeightManifest

MANIFEST_FILE = "manifest.json"
"""Name of the manifest inside a published folder; it is not a shard of itself."""

PUBLISHED_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Files that are published. Pickled weights and Python code never are."""

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2,
    "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
_MAX_HEADER_BYTES = 100 << 20


@dataclass(frozen=True, slots=True)
class VersionFields:
    """What the learner says of a version; the files say the rest (see ``WeightManifest``)."""

    run: str
    policy_version: int
    learner_step: int
    fork_step: int
    fence: int
    probe: tuple[ProbeSequence, ...] = ()
    created_ms: int = 0


def version_name(policy_version: int, fence: int) -> str:
    """Name of a version's folder or key part: ``v000012-f3``."""
    return f"v{policy_version:06d}-f{fence}"


def digest_bytes(data: bytes | memoryview) -> str:
    """xxh3_128 of raw bytes, as 32 hex digits: shard checksums and tensor digests alike."""
    return xxhash.xxh3_128(data).hexdigest()


def published_files(folder: Path) -> list[Path]:
    """Files of an HF-format folder that belong to a version, by name.

    Raises ``ManifestError`` when ``config.json`` or every safetensors file is missing.
    """
    if not folder.is_dir():
        raise ManifestError(f"no weights folder at {folder}")
    files = sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and path.suffix in PUBLISHED_SUFFIXES
        and path.name != MANIFEST_FILE
    )
    names = {path.name for path in files}
    if "config.json" not in names:
        raise ManifestError(f"{folder} has no config.json: it is not an HF-format folder")
    if not any(name.endswith(".safetensors") for name in names):
        raise ManifestError(f"{folder} has no *.safetensors file")
    return files


def build_manifest(
    folder: Path, fields: VersionFields, transport: Literal["file", "redis"], location: str
) -> WeightManifest:
    """Read every byte of an HF-format folder once and describe it.

    Raises ``ManifestError`` on a folder that is not whole or a safetensors file that is malformed,
    or when two files hold a tensor of the same name.
    """
    shards: list[ShardInfo] = []
    tensors: dict[str, TensorInfo] = {}
    for path in published_files(folder):
        shards.append(_shard_info(path))
        if path.suffix != ".safetensors":
            continue
        for tensor in tensor_infos(path):
            if tensor.name in tensors:
                raise ManifestError(f"tensor {tensor.name!r} is in two files, one is {path.name}")
            tensors[tensor.name] = tensor
    return WeightManifest(
        run=fields.run,
        policy_version=fields.policy_version,
        learner_step=fields.learner_step,
        fork_step=fields.fork_step,
        fence=fields.fence,
        transport=transport,
        location=location,
        shards=tuple(shards),
        tensors=tuple(tensors[name] for name in sorted(tensors)),
        probe=fields.probe,
        created_ms=fields.created_ms,
    )


def tensor_infos(path: Path) -> list[TensorInfo]:
    """Name, shape, dtype and digest of each tensor of a safetensors file, without interpreting it.

    Raises ``ManifestError`` when header and data disagree.
    """
    data = _mapped(path)
    start, header = _header(path, data)
    return [
        _tensor_info(path, name, entry, data[start:])
        for name, entry in header.items()
        if name != "__metadata__"
    ]


def dump_manifest(manifest: WeightManifest) -> str:
    """The manifest as one line of JSON: what the broker announces and the folder keeps."""
    return manifest.model_dump_json()


def load_manifest(text: str | bytes) -> WeightManifest:
    """Parse ``dump_manifest``'s output; ``ManifestError`` on anything else or another schema."""
    try:
        manifest = WeightManifest.model_validate_json(text)
    except ValidationError as error:
        raise ManifestError(f"manifest is unreadable: {error}") from error
    expected: int = WeightManifest.model_fields["schema_version"].default
    if manifest.schema_version != expected:
        raise ManifestError(
            f"manifest has schema {manifest.schema_version}, this build reads {expected}"
        )
    for shard in manifest.shards:
        check_shard_name(shard.name)
    return manifest


def check_shard_name(name: str) -> None:
    """``ManifestError`` on a shard name that could leave its folder or is not published."""
    if Path(name).name != name or name.startswith(".") or not name.endswith(PUBLISHED_SUFFIXES):
        raise ManifestError(f"shard name {name!r} is not the name of a published file")


def verify_folder(manifest: WeightManifest, folder: Path, *, contents: bool = True) -> None:
    """Compare every file of a folder with the manifest: size, then checksum.

    Without ``contents`` the checksums of ``*.safetensors`` are left out, for a caller that compares
    the digest of each tensor it takes.

    Raises ``ManifestError`` naming the shard that is missing, differs, or should not be there.
    """
    label = f"version {manifest.policy_version}"
    for shard in manifest.shards:
        check_shard_name(shard.name)
        path = folder / shard.name
        if not path.is_file():
            raise ManifestError(f"{label}: shard {shard.name} is missing from {folder}")
        size = path.stat().st_size
        if size != shard.size_bytes:
            raise ManifestError(
                f"{label}: shard {shard.name} has {size} bytes, "
                f"the manifest says {shard.size_bytes}"
            )
        if not contents and path.suffix == ".safetensors":
            continue
        found = _shard_info(path).xxh3_128
        if found != shard.xxh3_128:
            raise ManifestError(
                f"{label}: shard {shard.name} has checksum {found}, "
                f"the manifest says {shard.xxh3_128}"
            )
    listed = {shard.name for shard in manifest.shards}
    for path in published_files(folder):
        if path.name not in listed:
            raise ManifestError(f"{label}: {path.name} is in {folder} but not in the manifest")


def _shard_info(path: Path) -> ShardInfo:
    data = _mapped(path)
    return ShardInfo(name=path.name, size_bytes=len(data), xxh3_128=digest_bytes(data))


def _mapped(path: Path) -> memoryview:
    """The file's bytes without reading them into the heap; unmapped with the last reference."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:  # an empty file cannot be mapped
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _header(path: Path, data: memoryview) -> tuple[int, dict[str, Any]]:
    if len(data) < 8:
        raise ManifestError(f"{path.name} is too short to be a safetensors file")
    length = int.from_bytes(data[:8], "little")
    if length > min(len(data) - 8, _MAX_HEADER_BYTES):
        raise ManifestError(f"{path.name} is cut short: its header claims {length} bytes")
    try:
        header = json.loads(bytes(data[8 : 8 + length]))
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path.name} has a header that is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise ManifestError(f"{path.name} has a header that is not a JSON object")
    return 8 + length, header


def _tensor_info(path: Path, name: str, entry: Any, body: memoryview) -> TensorInfo:
    try:
        name.encode()  # JSON may hold half a character, a manifest must not
        dtype, shape = str(entry["dtype"]), tuple(int(side) for side in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except MALFORMED as error:
        raise ManifestError(f"{path.name}: header entry of {name!r} is malformed") from error
    if not 0 <= begin <= end <= len(body):
        raise ManifestError(
            f"{path.name} is cut short: {name!r} ends at {end} of {len(body)} bytes"
        )
    width = DTYPE_BYTES.get(dtype)
    if width is not None and math.prod(shape) * width != end - begin:
        raise ManifestError(f"{path.name}: {name!r} {dtype}{list(shape)} has {end - begin} bytes")
    return TensorInfo(name=name, shape=shape, dtype=dtype, digest=digest_bytes(body[begin:end]))
