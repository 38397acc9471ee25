"""The file transport: whole or not there, never removed under a reader, even a killed one."""

from __future__ import annotations

import asyncio
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import Callable
from pathlib import Path

import pytest

from ringasync.errors import ManifestError
from ringasync.weights.file_transport import FileTransport
from ringasync.weights.manifest import MANIFEST_FILE, VersionFields, load_manifest
from ringasync.weights.transport import fetched

FolderMaker = Callable[..., Path]


def _fields(version: int, fence: int = 3) -> VersionFields:
    return VersionFields("demo", version, version, 0, fence)


_READER = """
import asyncio, sys
from pathlib import Path
from ringasync.weights.file_transport import FileTransport
from ringasync.weights.manifest import load_manifest

async def main(root):
    manifest = load_manifest((root / "v000001-f3" / "manifest.json").read_text())
    await FileTransport(root).fetch(manifest, root)
    print("pinned", flush=True)
    sys.stdin.read()

asyncio.run(main(Path(sys.argv[1])))
"""


def _names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


async def test_published_folder_is_served_in_place(
    make_folder: FolderMaker, tmp_path: Path
) -> None:
    root, source = tmp_path / "weights", make_folder("a")
    transport = FileTransport(root)
    manifest = await transport.publish(source, _fields(12))
    folder = await transport.fetch(manifest, tmp_path / "unused")
    assert folder == root / "v000012-f3"
    assert load_manifest((folder / MANIFEST_FILE).read_bytes()) == manifest
    assert (folder / "model.safetensors").read_bytes() == (
        source / "model.safetensors"
    ).read_bytes()
    assert not (tmp_path / "unused").exists()
    assert _names(root) == ["v000012-f3"]


async def test_consume_moves_the_source_away(make_folder: FolderMaker, tmp_path: Path) -> None:
    source = make_folder("a")
    manifest = await FileTransport(tmp_path / "w").publish(source, _fields(1), consume=True)
    assert not source.exists()
    await FileTransport(tmp_path / "w").fetch(manifest, tmp_path)


async def test_the_last_versions_and_protected_ones_are_kept(
    make_folder: FolderMaker, tmp_path: Path
) -> None:
    root, source = tmp_path / "w", make_folder("a")
    transport = FileTransport(root, keep_versions=2)
    for version in range(1, 6):
        await transport.publish(source, _fields(version), protect={2})
    assert _names(root) == ["v000002-f3", "v000004-f3", "v000005-f3"]
    assert await transport.highest_version() == 5
    assert sorted(path.name for path in root.glob("*.lock")) == [
        f"{name}.lock" for name in _names(root)
    ]


async def test_a_version_being_read_by_another_process_is_never_removed(
    make_folder: FolderMaker, tmp_path: Path
) -> None:
    root, source = tmp_path / "w", make_folder("a")
    transport = FileTransport(root, keep_versions=2)
    manifest = await transport.publish(source, _fields(1))
    reader = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _READER, str(root), stdin=PIPE, stdout=PIPE
    )
    assert reader.stdout is not None
    assert await reader.stdout.readline() == b"pinned\n"
    for version in range(2, 5):
        await transport.publish(source, _fields(version))
    assert _names(root) == ["v000001-f3", "v000003-f3", "v000004-f3"]
    assert not await transport.discard(manifest)
    reader.kill()
    await reader.wait()
    await transport.publish(source, _fields(5))
    assert _names(root) == ["v000004-f3", "v000005-f3"]


async def test_fetched_pins_for_the_length_of_the_block(
    make_folder: FolderMaker, tmp_path: Path
) -> None:
    learner, worker = FileTransport(tmp_path / "w"), FileTransport(tmp_path / "w")
    manifest = await learner.publish(make_folder("a"), _fields(1))
    async with fetched(worker, manifest, tmp_path) as folder:
        assert not await learner.discard(manifest)
        assert folder.is_dir()
    assert await learner.discard(manifest)
    assert await learner.discard(manifest)
    with pytest.raises(ManifestError, match="version 1 is not at"):
        await worker.fetch(manifest, tmp_path)


async def test_damage_on_the_shared_path_is_found_and_leaves_no_pin(
    make_folder: FolderMaker, tmp_path: Path
) -> None:
    transport = FileTransport(tmp_path / "w")
    manifest = await transport.publish(make_folder("a"), _fields(1))
    (tmp_path / "w" / "v000001-f3" / "config.json").write_text("{}")
    with pytest.raises(ManifestError, match=r"config\.json"):
        await transport.fetch(manifest, tmp_path)
    assert await transport.discard(manifest)


async def test_publishing_again_repeats_the_answer_or_refuses(
    make_folder: FolderMaker, tmp_path: Path
) -> None:
    transport, source = FileTransport(tmp_path / "w"), make_folder("a")
    first = await transport.publish(source, _fields(1))
    assert await transport.publish(source, _fields(1)) == first
    with pytest.raises(ManifestError, match="never reused"):
        await transport.publish(make_folder("b", seed=1), _fields(1))


async def test_leftovers_of_killed_learners_go_but_not_of_a_newer_one(
    make_folder: FolderMaker, tmp_path: Path
) -> None:
    root = tmp_path / "w"
    for name in (".tmp-v000001-f3-x", ".trash-v000001-f2-9", ".tmp-v000001-f4-x"):
        (root / name).mkdir(parents=True)
    await FileTransport(root).publish(make_folder("a"), _fields(1))
    assert _names(root) == [".tmp-v000001-f4-x", "v000001-f3"]


async def test_a_folder_that_is_not_whole_publishes_nothing(
    make_folder: FolderMaker, tmp_path: Path
) -> None:
    source = make_folder("a")
    (source / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ManifestError, match="cut short"):
        await FileTransport(tmp_path / "w").publish(source, _fields(1))
    assert _names(tmp_path / "w") == []
    assert await FileTransport(tmp_path / "w").highest_version() == 0


async def test_readers_and_a_publisher_at_once_see_whole_versions_only(
    make_folder: FolderMaker, tmp_path: Path
) -> None:
    root, source = tmp_path / "w", make_folder("a", extra_bytes=100_000)
    learner = FileTransport(root, keep_versions=2)
    newest = await learner.publish(source, _fields(1))
    done = asyncio.Event()

    async def read() -> int:
        transport, reads = FileTransport(root), 0
        while not done.is_set() or reads == 0:
            async with fetched(transport, newest, tmp_path) as folder:
                assert (folder / "model.safetensors").stat().st_size > 100_000
            reads += 1
        return reads

    async def publish() -> None:
        nonlocal newest
        for version in range(2, 12):
            newest = await learner.publish(source, _fields(version))
        done.set()

    *reads, _ = await asyncio.gather(read(), read(), publish())
    assert min(filter(None, reads)) >= 1


async def test_a_cancelled_fetch_leaves_no_pin(make_folder: FolderMaker, tmp_path: Path) -> None:
    transport = FileTransport(tmp_path / "w")
    manifest = await transport.publish(make_folder("a", extra_bytes=5_000_000), _fields(1))
    for _ in range(20):
        fetching = asyncio.create_task(transport.fetch(manifest, tmp_path))
        await asyncio.sleep(0)
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching
    deadline = time.monotonic() + 10
    while not await transport.discard(manifest):
        assert time.monotonic() < deadline, "a pin stayed"


async def test_discard_all_and_close(make_folder: FolderMaker, tmp_path: Path) -> None:
    transport = FileTransport(tmp_path / "w")
    manifest = await transport.publish(make_folder("a"), _fields(1))
    await transport.fetch(manifest, tmp_path)
    await transport.release(manifest)
    await transport.release(manifest)
    await transport.fetch(manifest, tmp_path)
    await transport.close()
    assert await transport.discard(manifest)
    await transport.discard_all()
    assert not (tmp_path / "w").exists()
