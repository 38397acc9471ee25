"""Weights on a path that learner and workers share: one folder a version, renamed into place.

::

    weights/v000012-f3/          a published version (config.json, *.safetensors, manifest.json)
    weights/v000012-f3.lock      readers hold it shared (flock), whoever removes holds it alone
    weights/.tmp-v000013-f3-...  being written; left by a killed learner, removed by the next one
    weights/.trash-...           being removed

A pin is a kernel lock on an open file, so a killed reader never keeps a version alive.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

from ringasync.durable import folder_bytes, room_at, sync_path
from ringasync.errors import EnvironmentRefusedError, ManifestError
from ringasync.records.weights import WeightManifest
from ringasync.weights.manifest import (
    MANIFEST_FILE,
    VersionFields,
    build_manifest,
    dump_manifest,
    load_manifest,
    published_files,
    verify_folder,
    version_name,
)

_VERSION_PATTERN = re.compile(r"v(\d{6,})-f(\d+)")
_LEFTOVER_PATTERN = re.compile(r"\.(?:tmp|trash)-v\d{6,}-f(\d+)-")


class FileTransport:
    """``Transport`` over a folder, e.g. ``runs/NAME/weights`` on a disk that all roles see."""

    def __init__(self, root: Path, keep_versions: int = 3) -> None:
        self._root = root
        self._keep_versions = keep_versions
        self._pins: dict[str, list[int]] = defaultdict(list)

    async def publish(
        self,
        source_dir: Path,
        fields: VersionFields,
        *,
        consume: bool = False,
        protect: Collection[int] = (),
    ) -> WeightManifest:
        """See ``Transport.publish``. Files, folder and rename are fsynced before it returns."""
        return await asyncio.to_thread(self._publish, source_dir, fields, consume, set(protect))

    async def fetch(self, manifest: WeightManifest, into: Path, *, contents: bool = True) -> Path:
        """See ``Transport.fetch``: the published folder itself, pinned and checked, no copy."""
        del into
        fetching = asyncio.ensure_future(asyncio.to_thread(self._fetch, manifest, contents))
        try:
            return await asyncio.shield(fetching)
        except asyncio.CancelledError:  # the thread goes on: its pin must not stay
            fetching.add_done_callback(lambda done: self._undo(done, manifest))
            raise

    async def release(self, manifest: WeightManifest) -> None:
        """See ``Transport.release``."""
        self._unpin(manifest)

    async def discard(self, manifest: WeightManifest) -> bool:
        """See ``Transport.discard``."""
        return await asyncio.to_thread(self._remove, _name_of(manifest))

    async def discard_all(self) -> None:
        """See ``Transport.discard_all``."""
        await asyncio.to_thread(shutil.rmtree, self._root, True)

    async def highest_version(self) -> int:
        """See ``Transport.highest_version``."""
        versions = await asyncio.to_thread(self._versions)
        return max((version for version, _ in versions), default=0)

    async def close(self) -> None:
        """See ``Transport.close``."""
        for descriptors in self._pins.values():
            while descriptors:
                os.close(descriptors.pop())

    def _publish(
        self, source: Path, fields: VersionFields, consume: bool, protect: set[int]
    ) -> WeightManifest:
        name = version_name(fields.policy_version, fields.fence)
        target = self._root / name
        self._root.mkdir(parents=True, exist_ok=True)
        self._sweep(fields.fence)
        if target.exists():
            return self._published_before(source, fields, target)
        needed_bytes = folder_bytes(source)
        staging = Path(tempfile.mkdtemp(prefix=f".tmp-{name}-", dir=self._root))
        try:
            staging.chmod(0o755)
            for path in published_files(source):
                _bring(path, staging / path.name, consume)
            manifest = build_manifest(staging, fields, "file", name)
            (staging / MANIFEST_FILE).write_text(dump_manifest(manifest), encoding="utf-8")
            for path in staging.iterdir():
                sync_path(path)
            sync_path(staging)
            self._lock_path(name).touch()
            staging.rename(target)
        except BaseException as error:
            shutil.rmtree(staging, ignore_errors=True)
            if isinstance(error, OSError):
                raise EnvironmentRefusedError(
                    f"version {fields.policy_version} cannot be written to {target}: {error} "
                    f"({room_at(self._root, needed_bytes)}). Free disk space, or lower "
                    "weights.keep_versions, and start again: nothing is lost"
                ) from error
            raise
        sync_path(self._root)
        if consume:
            shutil.rmtree(source, ignore_errors=True)
        self._prune(protect)
        return manifest

    def _published_before(
        self, source: Path, fields: VersionFields, target: Path
    ) -> WeightManifest:
        before = load_manifest((target / MANIFEST_FILE).read_bytes())
        if build_manifest(source, fields, "file", target.name).shards != before.shards:
            raise ManifestError(
                f"{target} is published already with other bytes: policy versions are never reused"
            )
        return before

    def _fetch(self, manifest: WeightManifest, contents: bool) -> Path:
        name = _name_of(manifest)
        folder = self._root / name
        if not folder.is_dir():
            raise ManifestError(
                f"version {manifest.policy_version} is not at {folder}: removed since, "
                "or weights lie on a path that this machine does not share"
            )
        try:
            descriptor = os.open(self._lock_path(name), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise ManifestError(f"version {manifest.policy_version} is being removed") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            verify_folder(manifest, folder, contents=contents)
        except BaseException:
            os.close(descriptor)
            raise
        self._pins[name].append(descriptor)
        return folder

    def _unpin(self, manifest: WeightManifest) -> None:
        descriptors = self._pins.get(_name_of(manifest))
        if descriptors:
            os.close(descriptors.pop())

    def _undo(self, fetching: asyncio.Future[Path], manifest: WeightManifest) -> None:
        if not fetching.cancelled() and fetching.exception() is None:
            self._unpin(manifest)

    def _versions(self) -> list[tuple[int, int]]:
        """(version, fence) of every published folder, oldest first."""
        if not self._root.is_dir():
            return []
        matches = (_VERSION_PATTERN.fullmatch(path.name) for path in self._root.iterdir())
        return sorted((int(match[1]), int(match[2])) for match in matches if match)

    def _prune(self, protect: set[int]) -> None:
        for version, fence in self._versions()[: -self._keep_versions]:
            if version not in protect:
                self._remove(version_name(version, fence))

    def _remove(self, name: str) -> bool:
        """Remove one version if nobody holds its lock. Renamed first, so no reader sees a part."""
        folder, lock = self._root / name, self._lock_path(name)
        if not folder.is_dir():
            return True
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            trash = folder.rename(self._root / f".trash-{name}-{os.getpid()}")
            lock.unlink(missing_ok=True)
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        shutil.rmtree(trash, ignore_errors=True)
        return True

    def _sweep(self, fence: int) -> None:
        """Remove what killed learners left half written or half removed.

        Never a folder of a higher fence: its learner replaced this one and is at work.
        """
        for path in self._root.iterdir():
            match = _LEFTOVER_PATTERN.match(path.name)
            if match and int(match[1]) <= fence:
                shutil.rmtree(path, ignore_errors=True)

    def _lock_path(self, name: str) -> Path:
        return self._root / f"{name}.lock"


def _name_of(manifest: WeightManifest) -> str:
    """The folder's name, computed: ``location`` comes from outside and is never used as a path."""
    return version_name(manifest.policy_version, manifest.fence)


def _bring(source: Path, target: Path, consume: bool) -> None:
    if consume:
        shutil.move(source, target)
    else:
        shutil.copyfile(source, target)
