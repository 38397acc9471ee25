"""What the learner and the workers ask of a weight transport, whichever way the bytes go."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

from ringasync.records.weights import WeightManifest
from ringasync.weights.manifest import VersionFields


class Transport(Protocol):
    """Carries whole versions. Workers pull; nobody is waited for.

    A version is announced by the broker only after ``publish`` returned, so a worker never asks for
    one that is not whole. Versions stay until ``keep_versions`` newer ones exist, and longer while
    somebody reads them.
    """

    async def publish(
        self,
        source_dir: Path,
        fields: VersionFields,
        *,
        consume: bool = False,
        protect: Collection[int] = (),
    ) -> WeightManifest:
        """Make an HF-format folder available and return its manifest; then drop old versions.

        ``consume`` allows the source folder to be moved away instead of copied. ``protect`` names
        policy versions that must stay although old (a pinned evaluation). Publishing the same
        bytes again under the same version and fence answers as the first time did.

        Raises ``ManifestError`` (folder not whole, or the version exists with other bytes) and
        ``TransportRefusedError`` (too large for this transport; names the remedy).
        """
        ...

    async def fetch(self, manifest: WeightManifest, into: Path, *, contents: bool = True) -> Path:
        """Return a folder that holds exactly the manifest's files, each checked.

        ``into`` is a folder of the caller's where copies may be kept; a transport that can serve
        the published folder itself does not use it. The folder stays whole until ``release``.
        Without ``contents`` the checksums of weight files may be left out: the caller compares
        each tensor that it uses with the manifest.

        Raises ``ManifestError`` naming the shard that is missing or differs.
        """
        ...

    async def release(self, manifest: WeightManifest) -> None:
        """Undo one ``fetch``: drop the pin or the copy. Unknown manifests are ignored."""
        ...

    async def discard(self, manifest: WeightManifest) -> bool:
        """Remove a version unless somebody reads it; True when it is gone."""
        ...

    async def discard_all(self) -> None:
        """Remove every version of the run, read or not (``ringasync rm``)."""
        ...

    async def highest_version(self) -> int:
        """The highest policy version that was ever begun here and is still seen; 0 if none.

        A restarted learner must number above it: a version may be whole here yet unannounced.
        """
        ...

    async def close(self) -> None:
        """Release every fetch and the transport's own connections."""
        ...


@asynccontextmanager
async def fetched(
    transport: Transport, manifest: WeightManifest, into: Path
) -> AsyncIterator[Path]:
    """``fetch`` for the length of a ``with`` block."""
    folder = await transport.fetch(manifest, into)
    try:
        yield folder
    finally:
        await transport.release(manifest)
