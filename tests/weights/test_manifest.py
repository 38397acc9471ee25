"""The manifest says what is in a folder, and notices every way in which a folder differs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash
from safetensors.numpy import load_file

from ringasync.errors import ManifestError
from ringasync.records.weights import ProbeSequence
from ringasync.weights.manifest import (
    VersionFields,
    build_manifest,
    dump_manifest,
    load_manifest,
    tensor_infos,
    verify_folder,
    version_name,
)

FolderMaker = Callable[..., Path]


def _fields(version: int, fence: int = 3) -> VersionFields:
    return VersionFields("demo", version, version, 0, fence)


def test_every_file_and_tensor_is_described(make_folder: FolderMaker) -> None:
    folder = make_folder("a")
    manifest = build_manifest(folder, _fields(12), "file", "v000012-f3")
    assert [shard.name for shard in manifest.shards] == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    for shard in manifest.shards:
        data = (folder / shard.name).read_bytes()
        assert (shard.size_bytes, shard.xxh3_128) == (len(data), xxhash.xxh3_128_hexdigest(data))
    assert version_name(manifest.policy_version, manifest.fence) == "v000012-f3"


def test_tensor_digests_are_of_raw_bytes_in_the_published_dtype(make_folder: FolderMaker) -> None:
    folder = make_folder("a")
    arrays = load_file(folder / "model.safetensors")
    infos = {info.name: info for info in tensor_infos(folder / "model.safetensors")}
    assert set(infos) == set(arrays)
    for name, array in arrays.items():
        assert infos[name].digest == xxhash.xxh3_128_hexdigest(array.tobytes())
        assert infos[name].shape == array.shape
    assert {info.dtype for info in infos.values()} == {"F32", "F16"}


def test_a_manifest_survives_json(make_folder: FolderMaker) -> None:
    probe = (ProbeSequence(prompt_ids=(1, 2), token_ids=(3,), logprobs=(-0.1234567890123,)),)
    fields = VersionFields("demo", 5, 9, 2, 4, probe=probe, created_ms=77)
    manifest = build_manifest(make_folder("a"), fields, "redis", "x")
    assert load_manifest(dump_manifest(manifest)) == manifest


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"run": "demo"}', "\x00"])
def test_an_unreadable_manifest_is_refused(text: str) -> None:
    with pytest.raises(ManifestError, match="unreadable"):
        load_manifest(text)


def test_a_manifest_of_another_schema_is_refused(make_folder: FolderMaker) -> None:
    manifest = build_manifest(make_folder("a"), _fields(1), "file", "x")
    document = json.loads(dump_manifest(manifest)) | {"schema_version": 99}
    with pytest.raises(ManifestError, match="schema 99"):
        load_manifest(json.dumps(document))


@pytest.mark.parametrize("name", ["../config.json", "/etc/config.json", ".hidden.json", "run.py"])
def test_a_shard_name_cannot_leave_the_folder(make_folder: FolderMaker, name: str) -> None:
    document = json.loads(dump_manifest(build_manifest(make_folder("a"), _fields(1), "file", "x")))
    document["shards"][0]["name"] = name
    with pytest.raises(ManifestError, match="not the name of a published file"):
        load_manifest(json.dumps(document))


def test_a_whole_folder_verifies(make_folder: FolderMaker) -> None:
    folder = make_folder("a")
    verify_folder(build_manifest(folder, _fields(1), "file", "x"), folder)


def test_one_flipped_bit_is_found_and_its_shard_named(make_folder: FolderMaker) -> None:
    folder = make_folder("a")
    manifest = build_manifest(folder, _fields(1), "file", "x")
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ManifestError, match=r"shard model\.safetensors has checksum"):
        verify_folder(manifest, folder)


def test_short_missing_and_added_files_are_named(make_folder: FolderMaker) -> None:
    folder = make_folder("a")
    manifest = build_manifest(folder, _fields(1), "file", "x")
    (folder / "extra.safetensors").write_bytes(b"")
    with pytest.raises(ManifestError, match=r"extra\.safetensors .* not in the manifest"):
        verify_folder(manifest, folder)
    (folder / "extra.safetensors").unlink()
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ManifestError, match=r"shard tokenizer\.json has 1 bytes"):
        verify_folder(manifest, folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ManifestError, match=r"shard tokenizer\.json is missing"):
        verify_folder(manifest, folder)


def test_a_folder_without_config_or_weights_is_refused(
    make_folder: FolderMaker, tmp_path: Path
) -> None:
    folder = make_folder("a")
    (folder / "config.json").rename(tmp_path / "c")
    with pytest.raises(ManifestError, match=r"no config\.json"):
        build_manifest(folder, _fields(1), "file", "x")
    (tmp_path / "c").rename(folder / "config.json")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ManifestError, match=r"no .*safetensors"):
        build_manifest(folder, _fields(1), "file", "x")


@pytest.mark.parametrize("keep", [0, 4, 40, -3])
def test_a_cut_safetensors_file_is_refused(make_folder: FolderMaker, keep: int) -> None:
    path = make_folder("a") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ManifestError, match=r"too short|cut short"):
        tensor_infos(path)


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "has 4 bytes"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}, "cut short"),
        ({"dtype": "F32", "shape": [1]}, "malformed"),
        ([], "malformed"),
    ],
)
def test_a_header_that_disagrees_with_the_data_is_refused(
    tmp_path: Path, entry: object, complaint: str
) -> None:
    header = json.dumps({"w": entry}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + np.zeros(4).tobytes())
    with pytest.raises(ManifestError, match=complaint):
        tensor_infos(path)


def test_the_same_tensor_in_two_files_is_refused(make_folder: FolderMaker) -> None:
    folder = make_folder("a")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model-2.safetensors").write_bytes(data)
    with pytest.raises(ManifestError, match="is in two files"):
        build_manifest(folder, _fields(1), "file", "x")
